"""Several users share a store: what one cannot read is passed over, and use is noted by all."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.process.operations import perform
from engine_loader.compile_cache.retention import Policy, prune
from engine_loader.compile_cache.stores.filesystem import FilesystemStore
from engine_loader.compile_cache.stores.uses import note_used
from engine_loader.compile_cache.trust import Trust
from tests.compile_cache.support import KEY, OTHER_KEY, SECRET, Machine
from tests.compile_cache.test_stores import job, settings_for

POLICY = Policy(days=30, keys=100, bytes=1 << 40, unfinished_s=3600)
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


def as_user(uid: int, action: Callable[[], object]) -> None:
    """Do something in a child process as another user, with the umask that containers have."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.umask(0o022)
            os.setgroups([])
            os.setegid(2000)
            os.seteuid(uid)
            action()
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def expect(value: object, wanted: object) -> None:
    assert value == wanted, (value, wanted)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A store's root for a group, as an administrator makes it."""
    for path in [tmp_path, *tmp_path.parents]:
        if path.stat().st_uid == os.getuid() and str(path).startswith("/tmp/"):
            path.chmod(0o755)
    root = tmp_path / "shared"
    root.mkdir()
    os.chown(root, 0, 2000)
    root.chmod(0o2775)
    return root


def machine_of(uid: int, tmp_path: Path, store: Path, trust: Trust = SECRET) -> Machine:
    directory = tmp_path / f"user-{uid}"
    directory.mkdir(exist_ok=True)
    os.chown(directory, uid, 2000)
    return Machine(directory, store, trust)


@only_root
def test_what_one_user_saves_another_restores_and_adds_to(tmp_path: Path, shared: Path) -> None:
    first, second = machine_of(1001, tmp_path, shared), machine_of(1002, tmp_path, shared)

    def save(machine: Machine, name: str) -> None:
        machine.write(f"inductor/{name}", name.encode())
        expect(machine.save().status, "saved")

    as_user(1001, lambda: save(first, "one"))
    as_user(1002, lambda: expect(second.restore().files, 1))
    as_user(1002, lambda: save(second, "two"))
    as_user(1001, lambda: expect(first.restore().files, 1))
    (environment,) = (path for path in shared.iterdir() if path.is_dir())
    assert environment.stat().st_mode & 0o7777 == 0o2775
    assert {path.stat().st_mode & 0o777 for path in environment.rglob("*.tar.zst")} == {0o664}
    assert {path.stat().st_gid for path in shared.rglob("*")} == {2000}


@only_root
def test_a_directory_that_cannot_be_read_is_one_message_and_other_keys_go_on(tmp_path: Path, shared: Path) -> None:
    root = Machine(tmp_path / "root", shared)
    root.write("inductor/x", b"x")
    root.save()
    root.save(OTHER_KEY)
    for name in (KEY.prefix, *(f"foreign_{number:012x}/model" for number in range(3))):
        (shared / name).mkdir(parents=True, exist_ok=True)
        (shared / name).chmod(0o700)
    user = machine_of(1002, tmp_path, shared)

    def check() -> None:
        expect(user.restore(OTHER_KEY).status, "restored")
        user.write("inductor/new", b"new")
        outcome = user.save(OTHER_KEY)
        expect((outcome.status, outcome.messages), ("saved", []))
        outcome = user.restore()
        expect((outcome.files, len(outcome.messages)), (0, 1))
        expect(KEY.prefix in outcome.messages[0], True)
        done = prune(user.store, POLICY, SECRET)
        expect([name for name, _, _ in done.deleted], [])

    as_user(1002, check)


@only_root
def test_without_a_key_file_only_this_user_may_write(tmp_path: Path, store: Path) -> None:
    machine = Machine(tmp_path / "own", store, Trust())
    machine.write("inductor/x", b"x")
    os.umask(0)
    try:
        machine.save()
    finally:
        os.umask(0o022)
    assert all(not path.stat().st_mode & 0o022 for path in [store, *store.rglob("*")])


class TestUse:
    @pytest.fixture
    def old(self, first: Machine) -> Machine:
        """A key whose pack is 40 days old."""
        first.save()
        for path in first.store.directory.rglob("*.tar.zst"):
            os.utime(path, (time.time() - 40 * 86400,) * 2)
        return first

    def test_a_key_that_read_only_machines_use_stays(self, old: Machine, second: Machine) -> None:
        settings = settings_for(old.store.directory, read_only=True)
        (old.store.directory.parent / "key").write_bytes(b"sixteen bytes or more")
        (old.store.directory.parent / "key").chmod(0o600)
        settings = settings.model_copy(update={"key_file": str(old.store.directory.parent / "key")})
        assert perform(job("restore", second), settings).status == "restored"
        assert prune(old.store, POLICY, SECRET).deleted == []
        assert len(old.packs()) == 1

    def test_one_that_nobody_uses_goes_with_its_notes(self, old: Machine) -> None:
        note_used(old.store, KEY.prefix)
        (note,) = (old.store.directory / KEY.prefix).glob("used-*")
        os.utime(note, (time.time() - 31 * 86400,) * 2)
        assert [reason for _, _, reason in prune(old.store, POLICY, SECRET).deleted] == ["not used for 31 days"]
        assert sorted(path.name for path in old.store.directory.iterdir()) == ["engine-loader-store.json"]

    def test_a_note_is_written_once_a_day_and_old_ones_go(self, old: Machine) -> None:
        place = old.store.directory / KEY.prefix
        old.store.create(f"{KEY.prefix}/used-2020-01-01", b"")
        os.utime(place / "used-2020-01-01", (time.time() - 100,) * 2)
        for _ in range(3):
            store = FilesystemStore(old.store.directory, SECRET)
            store.entries(KEY.prefix)
            note_used(store, KEY.prefix)
            made = {path.name: path.stat().st_ino for path in place.glob("used-*")}
            assert len(made) == 2
        prune(old.store, POLICY, SECRET)
        assert [path.name for path in place.glob("used-*")] != ["used-2020-01-01"]
        assert len(list(place.glob("used-*"))) == 1

    def test_a_pack_that_is_refused_does_not_keep_a_key_young(self, old: Machine, tmp_path: Path) -> None:
        other = Machine(tmp_path / "other", old.store.directory, Trust(b"another secret, long enough"))
        other.write("inductor/x", b"x")
        other.save()
        assert len(old.packs()) == 2
        assert len(prune(old.store, POLICY, SECRET).deleted) == 1
        assert len(old.packs()) == 1

    def test_a_store_that_cannot_be_written_is_restored_from_all_the_same(
        self, old: Machine, second: Machine, tmp_path: Path
    ) -> None:
        store = old.store.directory
        if subprocess.run(["mount", "--bind", store, store], check=False).returncode:
            pytest.skip("nothing can be mounted here")
        try:
            subprocess.run(["mount", "-o", "remount,ro,bind", store], check=True)
            (tmp_path / "key").write_bytes(b"sixteen bytes or more")
            (tmp_path / "key").chmod(0o600)
            settings = settings_for(store, key_file=str(tmp_path / "key"))
            outcome = perform(job("restore", second), settings)
            assert (outcome.status, outcome.messages) == ("restored", [])
        finally:
            subprocess.run(["umount", store], check=True)


def test_one_old_key_is_not_kept_by_another_ones_use(first: Machine) -> None:
    other = CacheKey((("torch", "2.13.0"),), "other")
    first.save()
    first.save(other)
    for path in first.store.directory.rglob("*.tar.zst"):
        os.utime(path, (time.time() - 40 * 86400,) * 2)
    note_used(first.store, other.prefix)
    prune(first.store, POLICY, SECRET)
    assert first.packs() == []
    assert len(first.packs(other)) == 1
