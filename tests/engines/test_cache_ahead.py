"""What of the compile cache's store is read into the page cache before a restore, and what is left alone."""

import json
import logging
import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine_loader.compile_cache.process import session
from engine_loader.compile_cache.process.job import Job
from engine_loader.compile_cache.process.operations import perform
from engine_loader.compile_cache.process.outcome import Outcome
from engine_loader.compile_cache.trust import Trust
from engine_loader.engines.common import cache_hooks
from engine_loader.engines.common.start import cache_ahead, opened_last, restored_last
from engine_loader.engines.common.start.cache_ahead import WarmingStore, ahead_in_words, ahead_of_weights
from engine_loader.engines.common.start.restored_last import keep_restored, note_restored
from engine_loader.engines.vllm import cache as vllm_cache
from engine_loader.machine import Memory
from engine_loader.report.events import recorder
from engine_loader.start.opened_files import list_name, write_private
from engine_loader.start.page_reading import Budget
from engine_loader.start.page_warmer import warm_each
from tests.compile_cache.support import KEY, OTHER_KEY, EngineNode, Machine, some_bytes
from tests.support.children import NOBODY, in_child
from tests.support.page_cache import made_cold, share_of

MIB = 1 << 20
ANYONE = Trust(anyone=True)
ROOM = Memory(total=1 << 40, available=1 << 40, limit=None)


class Node(EngineNode):
    def restore(self) -> Outcome:
        return perform(Job("restore", "torch", KEY, self.directories()), self.settings)


class Fleet:
    """A store that one machine has filled, under two keys, and nodes that restore from it.

    Args:
        place: for everything.
        starts: the directory of starts.
    """

    def __init__(self, place: Path, starts: Path) -> None:
        self.place, self.starts = place, starts
        self.store = place / "store"
        self.first = Machine(place / "first", self.store, ANYONE)
        self.first.write("inductor/ab/large.so", some_bytes(3 * MIB, 1))
        self.first.save()
        (self.pack,) = self.first.packs()
        other = Machine(place / "other", self.store, ANYONE)
        other.write("inductor/ab/large.so", some_bytes(2 * MIB, 2))
        other.save(OTHER_KEY)
        (self.other_pack,) = other.packs(OTHER_KEY)
        self.marker, self.index = self.store / "engine-loader-store.json", self.pack.with_name("index")
        self.other_index = self.other_pack.with_name("index")

    @property
    def listed(self) -> Path:
        return self.starts / list_name("vllm", "0.32", "restored")

    def node(self, name: str) -> Node:
        return Node(Machine(self.place / name, self.store, ANYONE))

    def start(self, name: str) -> Outcome:
        """A start on a node: a restore, and that the engine is ready."""
        node = self.node(name)
        outcome = node.restore()
        directory = self.starts / "20261130T080000Z-1"
        directory.mkdir(exist_ok=True)
        restored_last._here.clear()
        note_restored(outcome, node.settings)
        keep_restored(directory, "vllm")
        assert list(directory.iterdir()) == []
        return outcome

    def files(self) -> list[Path]:
        return [path for path in self.store.rglob("*") if path.is_file() and path.stat().st_size]

    def warm(self, budget: Budget | None = None) -> WarmingStore:
        """Read ahead, with nothing of the store in the page cache."""
        made_cold(*self.files())
        return warmed(self.node("any"), budget)


def warmed(node: Node, budget: Budget | None = None) -> WarmingStore:
    (done,) = cache_ahead.cache_ahead(node.settings, budget or Budget(lambda: ROOM))
    assert isinstance(done, WarmingStore)
    warm_each(done)
    return done


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    starts = tmp_path / "starts"
    starts.mkdir()
    monkeypatch.setenv("ENGINE_LOADER_REPORT__DIRECTORY", str(starts))
    monkeypatch.setattr(recorder, "_directory", None)
    monkeypatch.setattr(restored_last, "_here", {})
    for module in (restored_last, opened_last):
        monkeypatch.setattr(module, "module_version", {"vllm": "0.32", "sglang": "none"}.__getitem__)
    return Fleet(tmp_path, starts)


def test_a_restore_says_what_it_read_of_each_file(fleet: Fleet) -> None:
    outcome = fleet.node("second").restore()
    read = {str(fleet.store / name): ranges for name, ranges in outcome.reads.items()}
    assert list(read) == list(map(str, [fleet.marker, fleet.index, fleet.pack]))
    assert read[str(fleet.index)] == [(0, fleet.index.stat().st_size)]
    assert read[str(fleet.pack)] == [(0, outcome.pack_bytes)]
    assert 3 * MIB <= outcome.pack_bytes < fleet.pack.stat().st_size  # its manifest is in the index
    again = fleet.node("second").restore()
    assert (again.status, again.reads[f"{KEY.prefix}/{fleet.pack.name}"]) == ("complete", [])


def test_what_the_last_start_restored_is_read_and_nothing_else(fleet: Fleet) -> None:
    fleet.start("second")
    done = fleet.warm()
    assert min(map(share_of, [fleet.marker, fleet.index])) == 1.0
    assert share_of(fleet.pack) > 0.9
    assert share_of(fleet.other_pack) == share_of(fleet.other_index) == 0.0
    assert (done.files, done.reason, done.passed_over) == (3, "", "")
    assert 3 * MIB < done.read < 3 * MIB + 64 * 1024
    assert ahead_in_words(done).startswith("compile cache: 3 files, 3.0")


def test_of_a_pack_what_the_last_start_did_not_want_is_left(fleet: Fleet) -> None:
    name = f"{KEY.prefix}/{fleet.pack.name}"
    note_restored(Outcome("restored", reads={name: [(MIB, MIB)]}), fleet.node("any").settings)
    (fleet.starts / "one").mkdir()
    keep_restored(fleet.starts / "one", "vllm")
    fleet.warm()
    assert 0.2 < share_of(fleet.pack) < 0.6


def test_a_start_that_found_all_in_place_has_the_next_read_no_pack(fleet: Fleet) -> None:
    fleet.start("second")
    fleet.start("second")
    fleet.warm()
    assert share_of(fleet.index) == 1.0
    assert share_of(fleet.pack) == 0.0


def test_a_pack_that_came_since_is_read_where_packs_of_its_key_were(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.start("second")
    fleet.first.write("inductor/ab/new.so", some_bytes(MIB, 3))
    fleet.first.save()
    (new,) = set(fleet.first.packs()) - {fleet.pack}
    fleet.pack.unlink()
    done = fleet.warm()
    assert share_of(new) > 0.9
    assert share_of(fleet.other_pack) == 0.0
    assert (done.files, done.passed_over) == (3, "")
    monkeypatch.setattr(cache_ahead, "MOST_NEW_BYTES", MIB)
    fleet.warm()
    assert share_of(new) == 0.0


def test_without_a_list_the_indexes_are_read_the_newest_first(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    done = fleet.warm()
    assert min(map(share_of, [fleet.marker, fleet.index, fleet.other_index])) == 1.0
    assert share_of(fleet.pack) == share_of(fleet.other_pack) == 0.0
    assert (done.files, done.passed_over) == (3, "")
    os.utime(fleet.other_index, (1, 1))
    monkeypatch.setattr(cache_ahead, "MOST_MANIFEST_BYTES", fleet.index.stat().st_size)
    fleet.warm()
    assert share_of(fleet.index) == 1.0
    assert share_of(fleet.other_index) == 0.0


def foreign(fleet: Fleet) -> list[str]:
    """Paths of which none may be in a list, each of a file that is there."""
    above = fleet.place / "elsewhere"
    shutil.copytree(fleet.store, above)
    (fleet.store / "ours").write_bytes(b"x")
    (fleet.pack.parent / "lease-save").write_bytes(b"x")
    return [
        "/etc/passwd",
        str(above / fleet.pack.relative_to(fleet.store)),
        f"{fleet.store}/../elsewhere/{fleet.pack.relative_to(fleet.store)}",
        f"{fleet.store}/{fleet.pack.parent.parent.name}/../{fleet.pack.relative_to(fleet.store)}",
        str(fleet.store / "ours"),
        str(fleet.pack.parent / "lease-save"),
        os.path.relpath(fleet.pack),
        "",
    ]


def believed(fleet: Fleet) -> bool:
    """Whether packs are read, as the list says, and not only indexes."""
    fleet.warm()
    assert share_of(fleet.index) == 1.0
    return share_of(fleet.pack) > 0.0


def test_a_list_that_names_anything_but_the_store_s_objects_is_not_believed(fleet: Fleet) -> None:
    fleet.start("second")
    sound = json.loads(fleet.listed.read_text())
    assert believed(fleet)
    for path in foreign(fleet):
        write_private(fleet.listed, json.dumps({**sound, path: [[0, 10]]}))
        assert not believed(fleet), path
    for ranges in (5, [5], [[0]], [[0, -1]], [[0, 1.5]], [[True, 1]], [[0, 1 << 70]], None):
        write_private(fleet.listed, json.dumps({**sound, str(fleet.index): ranges}))
        assert not believed(fleet), ranges
    for text in ("", "[", "[" * 100_000, "[]", "5", '"text"'):
        write_private(fleet.listed, text)
        assert not believed(fleet), text


def made_writable(path: Path) -> None:
    path.chmod(0o622)


def made_a_link(path: Path) -> None:
    path.rename(path.with_name("other"))
    path.symlink_to("other")


def made_another_user_s(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    os.chown(path, NOBODY, NOBODY)


@pytest.mark.parametrize("spoil", [made_writable, made_a_link, made_another_user_s])
def test_a_list_that_others_may_have_made_is_not_believed(fleet: Fleet, spoil: Callable[[Path], None]) -> None:
    fleet.start("second")
    assert stat.S_IMODE(fleet.listed.stat().st_mode) == 0o600
    assert believed(fleet)
    spoil(fleet.listed)
    assert not believed(fleet)


def test_a_list_of_another_store_is_not_believed(fleet: Fleet) -> None:
    fleet.start("second")
    fleet.store.rename(fleet.place / "moved")
    fleet.store.mkdir()
    moved = Node(Machine(fleet.place / "any", fleet.place / "moved"))
    pack = fleet.place / "moved" / fleet.pack.relative_to(fleet.store)
    made_cold(pack)
    assert warmed(moved).files == 3
    assert share_of(pack) == 0.0


def test_links_in_a_store_lead_nowhere_and_what_is_no_file_is_passed_over(fleet: Fleet, tmp_path: Path) -> None:
    fleet.start("second")
    outside = tmp_path / "outside"
    shutil.copytree(fleet.pack.parent, outside)
    shutil.rmtree(fleet.pack.parent)
    fleet.pack.parent.symlink_to(outside)
    fleet.other_index.unlink()
    os.mkfifo(fleet.other_index)
    made_cold(outside / fleet.pack.name, outside / "index")
    assert warmed(fleet.node("any")).files == 1  # the marker
    fleet.listed.unlink()
    assert warmed(fleet.node("any")).files == 1
    fleet.pack.parent.unlink()
    outside.rename(fleet.pack.parent)
    data = tmp_path / "data"
    fleet.pack.rename(data)
    fleet.pack.symlink_to(data)
    made_cold(data)
    fleet.start("third")
    warmed(fleet.node("any"))
    assert share_of(data) == 0.0


@pytest.mark.parametrize("there", [False, True])
def test_of_a_store_that_is_empty_or_missing_there_is_nothing_to_tell(tmp_path: Path, there: bool) -> None:
    node = Node(Machine(tmp_path / "node", tmp_path / "store"))
    if there:
        (tmp_path / "store").mkdir()
    assert ahead_in_words(warmed(node)) == ""


def test_an_object_store_is_left_alone(fleet: Fleet) -> None:
    node = fleet.node("any")
    node.settings = node.settings.model_copy(update={"directory": "s3://bucket/prefix"})
    said = "compile cache: nothing is read into the page cache: it lies in an object store"
    assert ahead_in_words(warmed(node)) == said
    note_restored(Outcome("restored", reads={"index": [(0, 5)]}), node.settings)
    assert restored_last._here == {}


def test_a_cache_that_is_switched_off_is_left_alone(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__DIRECTORY", str(fleet.store))
    assert len(ahead_of_weights()) == 1
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__ENABLED", "false")
    assert ahead_of_weights() == []
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__ENABLED", "true")
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__DIRECTORY", "~nobody-of-this-name/store")
    assert ahead_of_weights() == []


@pytest.mark.parametrize(("where", "late"), [("scandir", []), ("preadv", 0)])
def test_a_store_that_hangs_is_left_with_its_reason(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, where: str, late: object
) -> None:
    node, forever = fleet.node("any"), threading.Event()
    made_cold(*fleet.files())
    monkeypatch.setattr(cache_ahead, "PATIENCE_S", 0.5)
    monkeypatch.setattr(os, where, lambda *_: forever.wait() and late)
    try:
        done = warmed(node)
    finally:
        monkeypatch.undo()
        forever.set()
    assert (done.passed_over, done.reason) == (f"{fleet.store} gave nothing for 0.5 s", "")


def test_a_read_that_fails_is_a_reason_and_the_other_files_are_read(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.start("second")
    preadv, index = os.preadv, fleet.index.stat().st_ino

    def fail(descriptor: int, *rest: Any) -> int:
        if os.fstat(descriptor).st_ino == index:
            raise OSError(5, "Input/output error")
        return preadv(descriptor, *rest)

    monkeypatch.setattr(os, "preadv", fail)
    done = fleet.warm()
    assert (done.passed_over, done.reason) == ("it could not be read (Input/output error)", "")
    assert share_of(fleet.pack) > 0.9
    assert ahead_in_words(done).endswith("; the rest was left: it could not be read (Input/output error)")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_what_this_user_may_not_read_is_a_reason(fleet: Fleet) -> None:
    for path in (fleet.place, *fleet.place.parents):
        if path.name.startswith(("pytest-", "popen-", "test_")):
            path.chmod(0o755)
    for path in fleet.files():
        path.chmod(0o600)

    def read() -> str:
        return ahead_in_words(warmed(fleet.node("any")))

    said = in_child(read, user=NOBODY)
    assert said.startswith(f"compile cache: nothing is read into the page cache: {fleet.store}/")
    assert said.endswith(": Permission denied")


def test_a_file_in_the_place_of_a_store_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(b"x")
    node = Node(Machine(tmp_path / "node", tmp_path / "store"))
    assert warmed(node).passed_over == f"{tmp_path / 'store'} is no directory"


def test_it_shares_the_room_with_what_is_read_before_and_behind(fleet: Fleet) -> None:
    fleet.start("second")
    found = Memory(total=1 << 30, available=258 * MIB, limit=None)
    budget = Budget(lambda: found)
    done = fleet.warm(budget)
    assert done.reason == "there is no room for more"
    assert done.budget is budget
    assert 0 < done.read <= 2 * MIB  # the kernel may have read on by itself
    assert ahead_in_words(done).endswith("; the rest was left: there is no room for more")


def test_it_ends_when_it_is_told(fleet: Fleet) -> None:
    made_cold(*fleet.files())
    (done,) = cache_ahead.cache_ahead(fleet.node("any").settings, Budget(lambda: ROOM))
    done.run(lambda: True)
    assert share_of(fleet.index) == 0.0


def test_a_process_of_a_start_leaves_what_was_restored_for_it(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = fleet.node("any").settings
    index, other = (f"{key.prefix}/index" for key in (KEY, OTHER_KEY))
    note_restored(Outcome("complete", reads={index: [(0, 10)], f"{KEY.prefix}/suspect-{'a' * 64}": [(0, 1)]}), settings)
    start = fleet.starts / "one"
    start.mkdir()
    monkeypatch.setattr(recorder, "_directory", str(start))
    note_restored(Outcome("complete", reads={other: [(0, 20)]}), settings)
    (left,) = start.iterdir()
    left.rename(start / "restored-1.json")
    restored_last._here.clear()  # as it is in the process that keeps it
    note_restored(Outcome("failed"), settings)
    note_restored(Outcome("complete", reads={index: [(5, 10)]}), settings)
    assert len(list(start.iterdir())) == 2
    (start / "restored-2.json").write_text('["/etc/passwd"]')
    keep_restored(start, "vllm")
    assert restored_last.restored_last(fleet.store) == {
        index: [(0, 15)],
        other: [(0, 20)],
    }
    assert list(start.iterdir()) == []


def test_a_start_that_restores_nothing_leaves_the_list_and_lists_of_others_are_deleted(fleet: Fleet) -> None:
    fleet.start("second")
    kept = fleet.listed.read_text()
    restored_last._here.clear()
    (fleet.starts / "two").mkdir()
    keep_restored(fleet.starts / "two", "vllm")
    assert fleet.listed.read_text() == kept
    for number in range(20):
        write_private(fleet.starts / f"restored-vllm-{number}.json", "{}")
        os.utime(fleet.starts / f"restored-vllm-{number}.json", (number, number))
    fleet.start("second")
    assert len(list(fleet.starts.glob("restored-*.json"))) == 8


def test_what_an_engine_s_hooks_restore_is_noted(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the engine itself, and that of a model's description, which vLLM's first process restores."""
    index, other = (f"{key.prefix}/index" for key in (KEY, OTHER_KEY))
    log, settings = logging.getLogger("engine_loader.tests"), fleet.node("any").settings
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(fleet.place / "vllm"))
    monkeypatch.setenv(cache_hooks.STARTED, "")  # so that it is taken back
    monkeypatch.setattr(session, "run_job", lambda *_: Outcome("complete", reads={index: [(0, 10)]}))
    cache_hooks.NodeSession("vllm", KEY, settings, log, {}, on_trial=False).wait()
    assert restored_last._here == {f"{fleet.store}/{index}": [(0, 10)]}

    model = SimpleNamespace(_get_cache_dir=lambda: str(fleet.place), _get_cache_filename=lambda: "missing.json")
    monkeypatch.setattr(vllm_cache, "run_job", lambda *_: Outcome("complete", reads={other: [(0, 20)]}))
    monkeypatch.setattr(vllm_cache, "cache_settings", lambda: settings)
    monkeypatch.setattr(vllm_cache, "module_version", lambda _: "0.32")
    assert vllm_cache._restore_model_info(model) == fleet.place / "missing.json"
    assert list(restored_last._here) == [f"{fleet.store}/{index}", f"{fleet.store}/{other}"]
