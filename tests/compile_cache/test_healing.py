"""A store with damaged and unreadable packs: what is sound is restored, what is not is saved anew."""

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine_loader.compile_cache.compaction import compact
from engine_loader.compile_cache.packs.key_packs import read_packs
from engine_loader.compile_cache.packs.verify import verify
from engine_loader.compile_cache.process.job import Job
from engine_loader.compile_cache.process.operations import perform
from engine_loader.compile_cache.process.outcome import Outcome
from engine_loader.compile_cache.retention import Pruned
from engine_loader.compile_cache.unpacking.missing import missing_files
from engine_loader.compile_cache.upkeep.quarantine import find_pack, quarantine, release, repair
from tests.compile_cache.support import KEY, SECRET, EngineNode, Machine, some_bytes

LARGE = 9 << 20  # a file of this size has a frame of its own


def damage(pack: Path, position: int = 20) -> None:
    """Change one byte, in the first frame unless ``position`` says otherwise."""
    content = bytearray(pack.read_bytes())
    content[position] ^= 1
    pack.write_bytes(content)
    pack.with_name("index").unlink(missing_ok=True)  # it may hold small packs as a whole


def new_pack(machine: Machine, before: list[Path]) -> Path:
    (pack,) = set(machine.packs()) - set(before)
    return pack


@pytest.fixture
def two_frames(first: Machine) -> Machine:
    """A machine whose caches fill two frames of one pack; the first holds what every machine of the tests has."""
    first.write("inductor/zz/large.so", some_bytes(LARGE))
    return first


class TestRestore:
    def test_the_frames_beside_a_damaged_one_are_restored(self, two_frames: Machine, second: Machine) -> None:
        two_frames.save()
        damage(two_frames.packs()[0])
        outcome = second.restore()
        assert outcome.status == "restored"
        assert set(second.content()) == {"inductor/zz/large.so", "triton/" + two_frames_triton(two_frames)}
        (message,) = outcome.messages
        assert "the frame at byte 0 is damaged" in message

    def test_an_older_pack_of_the_same_path_takes_the_place_of_a_damaged_frame(
        self, first: Machine, second: Machine
    ) -> None:
        first.save()
        before = first.packs()
        first.write("inductor/ab/kernel.so", b"better code")
        first.save()
        damage(new_pack(first, before))
        outcome = second.restore()
        assert (outcome.status, outcome.files, len(outcome.messages)) == ("restored", 4, 1)
        assert second.content()["inductor/ab/kernel.so"] == b"code" * 1000

    @pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO, errno.EACCES])
    @pytest.mark.parametrize("when", ["open", "read"])
    def test_a_pack_that_cannot_be_read_does_not_end_the_restore(
        self, first: Machine, second: Machine, error: int, when: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first.save()
        before = first.packs()
        first.write("inductor/ab/kernel.so", b"better code")
        first.write("inductor/cd/only-there.so", some_bytes(400_000))
        first.save()
        failing(monkeypatch, second, new_pack(first, before).name, error, when)
        outcome = second.restore()
        assert (outcome.status, outcome.files) == ("restored", 4)
        assert os.strerror(error) in outcome.messages[0]
        assert second.content()["inductor/ab/kernel.so"] == b"code" * 1000

    def test_a_handle_that_the_server_has_lost_is_opened_again(
        self, first: Machine, second: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first.write("inductor/cd/some.so", some_bytes(400_000))
        first.save()
        failing(monkeypatch, second, first.packs()[0].name, errno.ESTALE, "read", times=1)
        outcome = second.restore()
        assert (outcome.status, outcome.files, outcome.messages) == ("restored", 5, [])

    def test_a_store_of_which_nothing_can_be_read_is_a_failure(
        self, first: Machine, second: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first.write("inductor/cd/some.so", some_bytes(400_000))
        first.save()
        failing(monkeypatch, second, first.packs()[0].name, errno.EIO, "read")
        outcome = second.restore()
        assert (outcome.status, outcome.files) == ("failed", 0)
        assert "could not be read" in outcome.messages[0]

    def test_a_pack_that_a_compaction_replaced_meanwhile_is_read_in_the_new_one(
        self, first: Machine, second: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first.save()
        first.write("inductor/cd/more.so", some_bytes(400_000))
        first.save()
        old = first.packs()
        planned: list[int] = []

        def replaced_meanwhile(*args: Any) -> Any:
            missing = missing_files(*args)
            if not planned:
                compact(first.store, KEY, SECRET, level=1, more_than=1)
                for path in old:
                    path.unlink()
            planned.append(missing.count)
            return missing

        monkeypatch.setattr("engine_loader.compile_cache.process.restore.missing_files", replaced_meanwhile)
        outcome = second.restore()
        assert (outcome.status, outcome.files, outcome.messages) == ("restored", 5, [])
        assert second.content() == first.content()
        assert len(planned) > 1

    def test_80_packs_are_restored_where_64_files_may_be_open(self, first: Machine, second: Machine) -> None:
        for number in range(80):
            first.write(f"inductor/ab/{number}.so", some_bytes(1000, number))
            first.save()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        there = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (there + 64, hard))
        try:
            outcome = second.restore(threads=64)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (outcome.status, outcome.packs, outcome.messages) == ("restored", 80, [])
        assert second.content() == first.content()
        assert len(os.listdir("/proc/self/fd")) == there

    def test_many_damaged_packs_are_told_in_few_lines(self, first: Machine, second: Machine) -> None:
        for number in range(8):
            before = first.packs()
            first.write(f"inductor/ab/{number}.so", some_bytes(1000, number))
            first.save()
            damage(new_pack(first, before))
        messages = second.restore().messages
        assert len(messages) == 3
        assert "(and 5 more: run `engine-loader compile-cache verify`)" in messages[-1]


def two_frames_triton(machine: Machine) -> str:
    (path,) = (path for path in machine.content() if path.startswith("triton/"))
    return path.partition("/")[2]


def failing(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, pack: str, error: int, when: str, times: int = 1 << 30
) -> None:
    """Let frames of one pack fail on this machine; its manifest can be read."""
    opened = machine.store.open
    failed = opens = 0
    opens_for_manifest = 1 << 30

    def fail(name: str) -> None:
        nonlocal failed
        failed += 1
        if failed <= times:
            raise OSError(error, os.strerror(error), name)

    @contextmanager
    def open_failing(name: str) -> Iterator[Any]:
        nonlocal opens
        if not name.endswith(pack):
            with opened(name) as file:
                yield file
            return
        opens += 1
        if when == "open" and opens > opens_for_manifest:
            fail(name)
        with opened(name) as file:
            read = file.read

            def read_failing(offset: int, size: int) -> bytes:
                if when == "read" and offset == 0:  # the first frame lies there
                    fail(name)
                return read(offset, size)

            file.read = read_failing  # type: ignore[method-assign]
            yield file

    for path in (
        machine.packs()
    ):  # so large that its manifest is not read together with its frames, nor kept in the index with them
        assert path.stat().st_size > 256 << 10 or path.name != pack
    monkeypatch.setattr(machine.store, "open", open_failing)
    read_packs(machine.store, KEY, SECRET, [])
    opens, opens_for_manifest = 0, opens


class Node(EngineNode):
    def perform(self, action: Any) -> Outcome:
        return perform(Job(action, "torch", KEY, self.directories()), self.settings)


@pytest.fixture
def nodes(tmp_path: Path, store: Path) -> list[Node]:
    from engine_loader.compile_cache.trust import Trust

    return [Node(Machine(tmp_path / f"node-{number}", store, Trust(anyone=True))) for number in range(4)]


class TestTheFleetHeals:
    def compile(self, node: Node) -> None:
        for name in ("one", "two"):
            file = node.machine.directories["inductor"] / f"ab/{name}.so"
            if not file.exists():
                node.machine.write(f"inductor/ab/{name}.so", name.encode() * 1000, mtime_ns=10**18)

    def test_what_only_a_damaged_pack_holds_is_saved_anew_and_the_next_machine_has_it(self, nodes: list[Node]) -> None:
        for node in nodes[:1]:
            self.compile(node)
            assert node.perform("save").status == "saved"
        damage(nodes[0].machine.packs()[0])
        assert nodes[1].perform("restore").status == "refused"
        self.compile(nodes[1])
        saved = nodes[1].perform("save")
        assert (saved.status, saved.files) == ("saved", 2)
        restored = nodes[2].perform("restore")
        assert (restored.status, restored.files) == ("restored", 2)
        assert nodes[2].machine.content() == nodes[0].machine.content()
        assert nodes[2].perform("save").status == "complete"

    def test_a_frame_that_can_be_read_again_is_not_saved_again(self, nodes: list[Node]) -> None:
        self.compile(nodes[0])
        nodes[0].perform("save")
        (pack,) = nodes[0].machine.packs()
        sound = pack.read_bytes()
        damage(pack)
        nodes[1].perform("restore")
        self.compile(nodes[1])
        pack.write_bytes(sound)
        assert nodes[1].perform("save").status == "complete"

    def test_what_restore_left_for_its_mode_is_not_saved_and_told(self, nodes: list[Node]) -> None:
        self.compile(nodes[0])
        nodes[0].settings = nodes[0].settings.model_copy(update={"trust": "owner"})
        (nodes[0].machine.directories["inductor"] / "ab/one.so").chmod(0o666)
        outcome = nodes[0].perform("save")
        assert (outcome.status, outcome.files) == ("saved", 1)
        assert "others may write it (mode 666)" in outcome.messages[0]

    def test_pruning_goes_on_when_a_compaction_fails(self, nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_args: Any, **_options: Any) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def note(*_args: Any, **_options: Any) -> Pruned:
            pruned.append(1)
            return Pruned()

        pruned: list[int] = []
        monkeypatch.setattr("engine_loader.compile_cache.process.tidy.compact", fail)
        monkeypatch.setattr("engine_loader.compile_cache.process.tidy.prune", note)
        node = Node(nodes[0].machine, compact_packs=2)
        for number in range(3):
            node.machine.write(f"inductor/ab/{number}.so", b"code")
            outcome = node.perform("save")
            assert outcome.status == "saved"
        assert pruned
        assert any("could not be tidied up" in note for note in outcome.notes)


class TestCompaction:
    def test_it_goes_around_a_damaged_frame_and_takes_the_older_copy(self, first: Machine, second: Machine) -> None:
        first.save()
        before = first.packs()
        first.write("inductor/ab/kernel.so", b"better code")
        first.write("inductor/cd/lost.so", b"only there")
        first.save()
        damage(new_pack(first, before))
        made = compact(first.store, KEY, SECRET, level=1)
        assert made is not None
        assert {file.path for file in made.manifest.files} == set(first.content()) - {"inductor/cd/lost.so"}
        assert len(made.manifest.replaces) == 2
        for path in first.packs():
            if path.name != made.stored.name.rpartition("/")[2]:
                path.unlink()
        second.restore()
        assert second.content()["inductor/ab/kernel.so"] == b"code" * 1000
        assert first.save().files == 2  # what was lost is saved anew

    def test_a_pack_that_cannot_be_read_stays_out_of_it(
        self, first: Machine, second: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(3):
            before = first.packs()
            first.write(f"inductor/ab/{number}.so", some_bytes(400_000, number))
            first.save()
        bad = new_pack(first, before)
        failing(monkeypatch, first, bad.name, errno.EIO, "read")
        made = compact(first.store, KEY, SECRET, level=1)
        assert made is not None
        assert bad.name.removesuffix(".tar.zst") not in made.manifest.replaces
        second.restore()
        assert second.content() == first.content()


class TestQuarantine:
    def test_a_pack_in_quarantine_is_not_used_and_its_files_are_saved_anew(
        self, first: Machine, second: Machine
    ) -> None:
        first.save()
        pack = find_pack(first.store, first.packs()[0].name[:8])
        assert quarantine(first.store, pack, "kills engines")
        assert not quarantine(first.store, pack, "again")
        assert second.restore().status == "nothing"
        assert read_packs(first.store, KEY, SECRET, []) == []
        (one,) = verify(first.store, SECRET)
        assert (one.quarantined, one.problem) == (True, None)
        release(first.store, pack)
        assert second.restore().status == "restored"

    def test_a_repair_keeps_what_is_sound_and_takes_the_damaged_pack_out_of_use(
        self, two_frames: Machine, second: Machine
    ) -> None:
        two_frames.save()
        (pack,) = two_frames.packs()
        damage(pack)
        ((stored, what),) = repair(two_frames.store, SECRET, verify(two_frames.store, SECRET), level=1)
        assert stored.name.endswith(pack.name)
        assert "what is sound of it is in" in what
        outcome = second.restore()
        assert (outcome.status, outcome.messages) == ("restored", [])
        assert set(second.content()) == {path for path in two_frames.content() if "large" in path or "triton" in path}
        assert repair(two_frames.store, SECRET, verify(two_frames.store, SECRET), level=1) == []
        assert two_frames.save().files == 3  # what was lost is saved anew
        assert Machine(second.directories["inductor"].parent.parent / "third", two_frames.store.directory).restore()

    def test_a_pack_of_another_key_file_is_no_damage(self, first: Machine, tmp_path: Path) -> None:
        from engine_loader.compile_cache.trust import Trust

        first.save()
        other = Trust(b"another secret of the fleet")
        (one,) = verify(first.store, other)
        assert one.problem is not None
        assert repair(first.store, other, [one], level=1) == []
        assert len(read_packs(first.store, KEY, SECRET, [])) == 1


def test_the_note_of_damage_is_about_one_store(first: Machine, tmp_path: Path) -> None:
    from engine_loader.compile_cache.upkeep.damage import note_damage, noted_damage

    note_damage(tmp_path, "/store", {("key/pack", 3)})
    assert noted_damage(tmp_path, "/store") == {("key/pack", 3)}
    assert noted_damage(tmp_path, "/another") == set()
    (tmp_path / ".engine_loader/damaged.json").write_text(json.dumps({"store": "/store"}))
    assert noted_damage(tmp_path, "/store") == set()
    note_damage(tmp_path, "/store", set())
    assert not (tmp_path / ".engine_loader/damaged.json").exists()
