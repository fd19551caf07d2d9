"""Many pods at once: equal saves are one pack, one pod works for all, and a restore costs the same whatever the number
of packs.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore

from benchmarks.fleet_cache import simulate
from engine_loader.compile_cache.compaction import compact
from engine_loader.compile_cache.packs.key_packs import living, read_key, update_index
from engine_loader.compile_cache.process import save as saving
from engine_loader.compile_cache.process.restore import Restore
from engine_loader.compile_cache.process.save import Save, SaveOptions, save
from engine_loader.compile_cache.process.tidy import tidy
from engine_loader.compile_cache.retention import GRACE_S, Policy, prune
from engine_loader.compile_cache.stores.filesystem import FilesystemStore
from engine_loader.compile_cache.stores.leases import acquire
from engine_loader.compile_cache.stores.objects import ObjectCacheStore
from engine_loader.compile_cache.trust.denied import DenyList
from engine_loader.settings import CompileCacheSettings
from tests.compile_cache.support import KEY, SECRET, Machine, scan_any, some_bytes, unfinished
from tests.support.waiting import GENEROUS_S

POLICY = Policy(days=30, keys=100, bytes=1 << 40, unfinished_s=3600)


def options(wait_s: float = 0.0) -> SaveOptions:
    return SaveOptions(threads=1, level=1, most_bytes=1 << 40, wait_s=wait_s)


def save_of(machine: Machine, wait_s: float = 0.0) -> Save:
    files = scan_any(machine.directories)
    return Save(machine.store, KEY, machine.directories, files, SECRET, options(wait_s))


def equal_machines(tmp_path: Path, store: Path, count: int) -> list[Machine]:
    """They compiled alike, at different times and in different directories."""
    machines = []
    for number in range(count):
        machine = Machine(tmp_path / f"pod-{number}", store)
        for name in range(10):
            machine.write(f"inductor/{name}.so", some_bytes(20_000, name), mtime_ns=10**18 + number)
        group = machine.write("triton/k/__grp__k.json")
        group.write_text(f'{{"child_paths": {{"k.cubin": "{machine.directories["triton"]}/k/k.cubin"}}}}')
        machines.append(machine)
    return machines


def save_when(barrier: Any, machine: Machine, wait_s: float) -> None:
    barrier.wait(GENEROUS_S)
    assert save_of(machine, wait_s).run().status in ("saved", "complete")


@pytest.mark.parametrize("wait_s", [0.0, 60.0])
def test_24_savers_of_one_content_leave_one_pack(wait_s: float, tmp_path: Path, store: Path) -> None:
    """Without group files also where nobody waits for another; they name each pod's own directories."""
    machines = equal_machines(tmp_path, store, 24)
    if not wait_s:
        for machine in machines:
            (machine.directories["triton"] / "k/__grp__k.json").unlink()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(24)
    processes = [context.Process(target=save_when, args=(barrier, machine, wait_s)) for machine in machines]
    for process in processes:
        process.start()
    for process in processes:
        process.join(GENEROUS_S)
        assert process.exitcode == 0
    assert len(machines[0].packs()) == 1
    assert unfinished(machines[0].store) == []
    assert [entry.kind for entry in machines[0].store.entries(KEY.prefix)] == ["pack", "index"]


def test_equal_content_has_one_name_whenever_and_wherever_it_was_made(tmp_path: Path) -> None:
    names = set()
    for number, machine in enumerate(equal_machines(tmp_path, tmp_path / "unused", 2)):
        (machine.directories["triton"] / "k/__grp__k.json").unlink()
        machine.store = FilesystemStore(tmp_path / f"store-{number}", SECRET)
        machine.save()
        names.add(machine.packs()[0].name)
    assert len(names) == 1


def test_a_commit_does_not_replace_what_has_its_name(tmp_path: Path, store: Path) -> None:
    one, other = equal_machines(tmp_path, store, 2)
    for machine in (one, other):
        (machine.directories["triton"] / "k/__grp__k.json").unlink()
    one.save()
    (path,) = one.packs()
    facts = path.stat()
    with other.store.upload(KEY.prefix) as upload:
        upload.write(b"something else")
        upload.commit(f"{KEY.prefix}/{path.name}")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (facts.st_ino, facts.st_mtime_ns)
    assert unfinished(other.store) == []


def test_a_waiting_saver_saves_only_what_the_first_did_not_have(
    first: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first finishes while the other waits for the lease."""
    first.store.found()
    lease = acquire(first.store, KEY.prefix, "save", 60)
    assert lease is not None
    other = Machine(tmp_path / "other", first.store.directory)
    for path, content in first.content().items():
        other.write(path, content)
    other.write("inductor/own.so", b"only here")
    waited = threading.Event()
    finished = threading.Event()

    def pause(_seconds: float) -> None:
        waited.set()
        finished.wait(GENEROUS_S)

    monkeypatch.setattr(saving.time, "sleep", pause)
    results = []
    thread = threading.Thread(target=lambda: results.append(save_of(other, wait_s=GENEROUS_S).run()))
    thread.start()
    assert waited.wait(GENEROUS_S)
    monkeypatch.undo()
    first.store.delete(lease.name)
    assert save_of(first).run().files == 4
    finished.set()
    thread.join(GENEROUS_S)
    assert [(outcome.status, outcome.files) for outcome in results] == [("saved", 1)]


def test_who_has_waited_long_enough_saves_all_the_same(first: Machine) -> None:
    first.store.found()
    assert acquire(first.store, KEY.prefix, "save", 3600) is not None
    assert save_of(first, wait_s=0.1).run().status == "saved"


class TestLease:
    @pytest.fixture
    def shared(self, store: Path) -> FilesystemStore:
        made = FilesystemStore(store, SECRET)
        made.found()
        return made

    def test_only_one_has_it(self, shared: FilesystemStore) -> None:
        lease = acquire(shared, KEY.prefix, "save", 60)
        assert lease is not None
        assert acquire(shared, KEY.prefix, "save", 60) is None
        assert acquire(shared, KEY.prefix, "compact", 60) is not None
        lease.release()
        assert acquire(shared, KEY.prefix, "save", 60) is not None

    def test_one_that_ran_out_is_taken_over_by_one(self, shared: FilesystemStore, store: Path) -> None:
        old = acquire(shared, KEY.prefix, "save", 60)
        assert old is not None
        os.utime(store / old.name, (time.time() - 61,) * 2)
        stores = [FilesystemStore(store, SECRET) for _ in range(16)]
        got: list[object] = []
        threads = [
            threading.Thread(target=lambda one=one: got.append(acquire(one, KEY.prefix, "save", 60))) for one in stores
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len([lease for lease in got if lease is not None]) == 1
        old.release()  # whose it is no more
        assert acquire(shared, KEY.prefix, "save", 60) is None

    @pytest.mark.parametrize("content", [b"", b"{", b'{"seconds": "x"}', b'{"seconds": 1e300}'])
    def test_one_that_cannot_be_read_runs_out_too(self, content: bytes, shared: FilesystemStore, store: Path) -> None:
        shared.create(f"{KEY.prefix}/lease-save", content)
        assert acquire(shared, KEY.prefix, "save", 60) is None
        os.utime(store / KEY.prefix / "lease-save", (time.time() - 3700,) * 2)
        assert acquire(shared, KEY.prefix, "save", 60) is not None


@contextmanager
def opened() -> Iterator[list[str]]:
    """Names of the files that are opened below a store."""
    names: list[str] = []
    plain = FilesystemStore._open

    def note(self: FilesystemStore, name: str) -> Any:
        names.append(name.rpartition("/")[2])
        return plain(self, name)

    FilesystemStore._open = note  # type: ignore[method-assign]
    try:
        yield names
    finally:
        FilesystemStore._open = plain  # type: ignore[method-assign]


class TestManyPacks:
    @pytest.fixture
    def many(self, tmp_path: Path, store: Path) -> Machine:
        """700 packs of one file each."""
        machine = Machine(tmp_path / "many", store)
        machine.store.found()
        for number in range(700):
            machine.write(f"inductor/{number}.so", some_bytes(100, number))
        # As if each was saved by a pod of its own, without the index that each would write.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(saving, "update_index", lambda *_: None)
            patch.setattr(saving, "read_key", lambda *_, **__: saving.KeyPacks())
            patch.setattr(os, "fsync", lambda _: None)
            for file in scan_any(machine.directories):
                Save(machine.store, KEY, machine.directories, [file], SECRET, options())._save(
                    saving.KeyPacks(), [file]
                )
        update_index(machine.store, KEY.prefix, SECRET)
        return machine

    def test_a_start_with_nothing_new_opens_two_objects(self, many: Machine) -> None:
        reader = Machine(many.directories["inductor"].parent, many.store.directory)
        with opened() as names:
            assert reader.restore().status == "complete"
        assert names == ["engine-loader-store.json", "index"]

    def test_without_an_index_a_few_are_read_and_the_rest_is_told_of(self, many: Machine, second: Machine) -> None:
        (many.store.directory / KEY.prefix / "index").unlink()
        with opened() as names:
            outcome = second.restore()
        assert (outcome.status, outcome.files) == ("restored", 16)
        assert len(set(names) - {"engine-loader-store.json"}) == 16
        assert "684 packs are not in the key's index" in outcome.messages[0]
        update_index(many.store, KEY.prefix, SECRET)
        assert second.restore().files == 684
        assert second.content() == many.content()

    def test_they_are_put_together(self, many: Machine, second: Machine) -> None:
        assert compact(many.store, KEY, SECRET, level=1, more_than=3) is not None
        assert len(living(read_key(many.store, KEY.prefix, SECRET).packs)) == 1
        prune(many.store, POLICY, SECRET, now=time.time() + GRACE_S + 1)
        assert len(many.packs()) == 1
        assert second.restore().files == 700
        assert second.content() == many.content()


class TestIndex:
    @pytest.mark.parametrize("content", [b"", b"x" * 100, b"ELINDEX2\xff\xff\xff\xff", b"ELINDEX2\2\0\0\0[]"])
    def test_one_that_is_damaged_does_no_harm(self, content: bytes, first: Machine, second: Machine) -> None:
        first.save()
        (first.store.directory / KEY.prefix / "index").write_bytes(content)
        assert second.restore().status == "restored"
        assert second.content() == first.content()

    def test_any_changed_byte_does_no_harm(self, first: Machine, second: Machine) -> None:
        first.save()
        path = first.store.directory / KEY.prefix / "index"
        sound = path.read_bytes()
        for position in range(len(sound)):
            path.write_bytes(sound[:position] + bytes([sound[position] ^ 0x40]) + sound[position + 1 :])
            (found,) = read_key(second.store, KEY.prefix, SECRET).packs
            assert len(found.manifest.files) == 4

    def test_writers_at_once_leave_one_that_has_all(self, tmp_path: Path, store: Path) -> None:
        context = multiprocessing.get_context("fork")
        barrier = context.Barrier(12)
        machines = [Machine(tmp_path / f"pod-{number}", store) for number in range(12)]
        for number, machine in enumerate(machines):
            machine.write(f"inductor/{number}.so", some_bytes(1000, number))
        processes = [context.Process(target=save_when, args=(barrier, machine, 0.0)) for machine in machines]
        for process in processes:
            process.start()
        for process in processes:
            process.join(GENEROUS_S)
            assert process.exitcode == 0
        reader = Machine(tmp_path / "reader", store)
        with opened() as names:
            assert len(read_key(reader.store, KEY.prefix, SECRET).packs) == 12
        assert names == ["engine-loader-store.json", "index"]

    def test_what_is_quarantined_is_out(self, first: Machine, second: Machine) -> None:
        first.save()
        (pack,) = first.store.list()
        first.store.create(f"{KEY.prefix}/quarantined-{pack.digest}", b"{}")
        assert second.restore().status == "nothing"
        assert first.save().status == "saved"  # anew, under another name
        assert second.restore().status == "restored"
        assert second.content() == first.content()


class TestUnsignedBytes:
    def test_three_sparse_files_cost_nothing(
        self, first: Machine, second: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first.save()
        place = first.store.directory / KEY.prefix
        for number in range(3):
            with (place / f"{number:064x}.tar.zst").open("wb") as file:
                file.truncate(256 << 20)
        read = []
        plain = os.pread
        monkeypatch.setattr(os, "pread", lambda fd, size, offset: read.append(size) or plain(fd, size, offset))
        outcome = second.restore()
        assert (outcome.status, outcome.files) == ("restored", 4)
        assert sum(read) < 1 << 20
        assert len(outcome.messages) == 1
        assert "and 2 more" in outcome.messages[0]

    def test_a_forged_end_that_says_32_mib_is_refused_before_they_are_read(
        self, first: Machine, second: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first.save()
        (path,) = first.packs()
        trailer = bytearray(path.read_bytes()[-52:])
        trailer[32:40] = (32 << 20).to_bytes(8, "little")
        with (path.parent / f"{'0' * 64}.tar.zst").open("wb") as file:
            file.truncate(64 << 20)
            file.seek(0, os.SEEK_END)
            file.write(path.read_bytes()[-84:-52] + trailer)
        read = []
        plain = os.pread
        monkeypatch.setattr(os, "pread", lambda fd, size, offset: read.append(size) or plain(fd, size, offset))
        assert second.restore().status == "restored"
        assert sum(read) < 1 << 20

    def test_thousands_of_junk_packs_are_one_line_and_few_reads(self, first: Machine, second: Machine) -> None:
        first.save()
        place = first.store.directory / KEY.prefix
        for number in range(3000):
            (place / f"{number:064x}.tar.zst").write_bytes(b"junk")
        with opened() as names:
            outcome = second.restore()
        assert outcome.status == "restored"
        assert len(outcome.messages) == 1
        assert len(names) < 25


def test_a_restore_of_three_large_packs_from_a_store_with_a_deny_list_is_five_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, asked = MemoryStore(), []

    def opened_anew() -> ObjectCacheStore:
        store = ObjectCacheStore("s3://caches/fleet", SECRET, str(tmp_path))
        store._store = memory  # type: ignore[assignment]
        return store

    for name in ("get", "put", "head", "delete", "list"):
        plain = getattr(obstore, name)
        monkeypatch.setattr(
            obstore, name, lambda *args, _name=name, _plain=plain, **more: asked.append(_name) or _plain(*args, **more)
        )
    settings = CompileCacheSettings(directory="s3://caches/fleet")
    machine = Machine(tmp_path / "a", tmp_path / "unused")
    for number in range(3):
        machine.write(f"inductor/{number}.so", some_bytes(400_000, number))
        store = opened_anew()
        files = scan_any(machine.directories)
        outcome = save(store, KEY, machine.directories, files, SECRET, threads=1, level=1, most_bytes=1 << 40)
        tidy(store, KEY, settings, SECRET, outcome)
    SECRET.publish_denied(opened_anew(), DenyList().with_denied({"ab" * 32: "bad"}), None)
    asked.clear()
    store = opened_anew()
    trust = SECRET.with_denied(store, None)
    target = {name: tmp_path / "b" / name for name in machine.directories}
    outcome = Restore(store, KEY, target, trust, threads=2).run()
    assert (outcome.status, outcome.files) == ("restored", 3)
    assert len(trust.denied.packs) == 1
    assert len(asked) <= 5, asked


def test_a_fleet_that_starts_at_once(tmp_path: Path) -> None:
    rounds = simulate(tmp_path / "fleet", pods=24, kernels=4, seed=3)
    for name, result in rounds.items():
        assert result.stored <= 3, name
        assert len(result.saves) == 24
    warm = rounds["a full key"]
    assert max(use.requests for use in warm.restores) <= 5
    assert {outcome.status for outcome in warm.outcomes} == {"restored"}
    # Beside the files' own bytes: the marker and the ends of the packs.
    beside = [use.read - outcome.pack_bytes for use, outcome in zip(warm.restores, warm.outcomes, strict=True)]
    assert max(beside) < 16 << 10
    assert {outcome.status for outcome in rounds["an empty key"].outcomes} == {"nothing"}
    assert {outcome.status for outcome in rounds["after an upgrade"].outcomes} == {"nothing"}
    for name in ("an empty key", "after an upgrade"):
        # One pod writes the cache, some write a kernel of their own.
        written = sorted(use.written for use in rounds[name].saves)
        assert written[-1] > 20 * written[len(written) // 2], name
