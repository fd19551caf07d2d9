"""Without keys, a store counts when nobody but this user and root could have put something there."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engine_loader import machine
from engine_loader.compile_cache.cache_errors import CacheValidationError
from engine_loader.compile_cache.trust import Trust, places
from tests.compile_cache.support import Machine

Mounted = Callable[[str, Path], None]


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mounted:
    """Say that a directory is the mount point of a kind of file system."""

    def mount(kind: str, point: Path) -> None:
        proc = tmp_path / "proc"
        (proc / "self").mkdir(parents=True, exist_ok=True)
        escaped = str(point).replace(" ", "\\040")
        lines = f"20 1 0:1 / / rw - ext4 /dev/vda rw\n21 20 0:2 / {escaped} rw,nosuid - {kind} server rw\n"
        (proc / "self" / "mountinfo").write_text(lines)
        monkeypatch.setattr(places, "mount_of", lambda path: machine.mount_of(path, proc))

    return mount


@pytest.fixture
def saved(tmp_path: Path, store: Path) -> Machine:
    made = Machine(tmp_path / "first", store, Trust())
    made.write("inductor/a", b"code")
    made.save()
    return made


def outcome_of(directory: Path, store: Path, trust: Trust | None = None) -> tuple[str, str]:
    """(status, the first message) of a restore into new caches."""
    outcome = Machine(directory, store, trust or Trust()).restore()
    return outcome.status, (outcome.messages or [""])[0]


class TestMounts:
    @pytest.mark.parametrize(
        "kind",
        ["fuse.s3fs", "fuse.goofys", "fuse.rclone", "fuse.sshfs", "fuse.mountpoint-s3", "fuse", "cifs", "smb3", "9p"],
    )
    def test_those_that_make_owners_up_need_a_key(
        self, kind: str, saved: Machine, store: Path, tmp_path: Path, mounted: Mounted
    ) -> None:
        mounted(kind, store)
        status, message = outcome_of(tmp_path / "second", store)
        assert status == "refused"
        assert f"{store} is a mount of the kind {kind}" in message
        assert "compile_cache.key_file" in message
        again = Machine(tmp_path / "first", store, Trust())
        again.write("inductor/b", b"more")
        with pytest.raises(CacheValidationError, match=f"of the kind {kind}"):
            again.save()

    @pytest.mark.parametrize("kind", ["ext4", "xfs", "nfs4", "virtiofs", "fuse.hf3fs", "fuse.juicefs", "overlay"])
    def test_those_that_keep_owners_do_not(
        self, kind: str, saved: Machine, store: Path, tmp_path: Path, mounted: Mounted
    ) -> None:
        mounted(kind, store)
        assert outcome_of(tmp_path / "second", store) == ("restored", "")

    def test_with_a_key_the_mount_does_not_matter(self, store: Path, tmp_path: Path, mounted: Mounted) -> None:
        trust = Trust(b"a secret of some length")
        first = Machine(tmp_path / "first", store, trust)
        mounted("fuse.s3fs", store)
        first.write("inductor/a", b"code")
        assert first.save().status == "saved"
        assert outcome_of(tmp_path / "second", store, trust) == ("restored", "")

    def test_a_setting_allows_them(self, saved: Machine, store: Path, tmp_path: Path, mounted: Mounted) -> None:
        mounted("cifs", store)
        assert outcome_of(tmp_path / "second", store, Trust(anyone=True)) == ("restored", "")

    def test_one_that_is_behind_a_link_is_found(
        self, saved: Machine, store: Path, tmp_path: Path, mounted: Mounted
    ) -> None:
        bucket = store.rename(tmp_path / "a bucket")
        store.symlink_to(bucket)
        mounted("fuse.s3fs", bucket)
        assert "fuse.s3fs" in outcome_of(tmp_path / "second", store)[1]

    def test_where_the_kind_cannot_be_told_a_key_is_needed(
        self, saved: Machine, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(places, "mount_of", lambda path: machine.mount_of(path, tmp_path / "no proc"))
        assert "is not known" in outcome_of(tmp_path / "second", store)[1]


class TestTheWayToAStore:
    def test_a_link_in_a_directory_that_others_may_write_is_refused(
        self, saved: Machine, store: Path, tmp_path: Path
    ) -> None:
        open_to_all = tmp_path / "open"
        open_to_all.mkdir()
        (open_to_all / "link").symlink_to(store)
        assert outcome_of(tmp_path / "second", open_to_all / "link")[0] == "restored"
        open_to_all.chmod(0o777)
        status, message = outcome_of(tmp_path / "third", open_to_all / "link")
        assert status == "refused"
        assert f"{open_to_all} above it" in message

    def test_so_is_one_that_is_reached_by_further_links(self, saved: Machine, store: Path, tmp_path: Path) -> None:
        open_to_all = tmp_path / "open"
        (open_to_all / "inner").mkdir(parents=True)
        (open_to_all / "inner" / "up").symlink_to("../../store")
        (tmp_path / "link").symlink_to("open/inner/up")
        open_to_all.chmod(0o777)
        status, message = outcome_of(tmp_path / "second", tmp_path / "link")
        assert (status, f"{open_to_all} above it" in message) == ("refused", True)

    def test_the_real_directories_count_as_well(self, saved: Machine, store: Path, tmp_path: Path) -> None:
        open_to_all = tmp_path / "open"
        open_to_all.mkdir()
        store.rename(open_to_all / "store")
        store.symlink_to(open_to_all / "store")
        open_to_all.chmod(0o777)
        assert outcome_of(tmp_path / "second", store)[0] == "refused"

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
    def test_a_sticky_directory_passes_only_when_it_is_roots(self, saved: Machine, store: Path, tmp_path: Path) -> None:
        sticky = tmp_path / "sticky"
        sticky.mkdir()
        store.rename(sticky / "store")
        sticky.chmod(0o1777)
        assert outcome_of(tmp_path / "second", sticky / "store")[0] == "restored"
        os.chown(sticky, 12345, 12345)
        status, message = outcome_of(tmp_path / "third", sticky / "store")
        assert (status, "belongs to user 12345" in message) == ("refused", True)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link away")
    def test_a_link_of_another_user_is_refused(self, saved: Machine, store: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(store)
        os.lchown(tmp_path / "link", 12345, 12345)
        assert "belongs to user 12345" in outcome_of(tmp_path / "second", tmp_path / "link")[1]

    def test_links_that_go_round_in_circles_end(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        with pytest.raises(OSError, match="too many symbolic links"):
            list(places.steps_to(tmp_path / "a" / "store"))
