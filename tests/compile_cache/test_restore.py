"""What is saved on one machine is there on another; what is there already stays as it is."""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard

from engine_loader.compile_cache.cache_errors import CacheOperationInterrupted
from engine_loader.compile_cache.process.restore import Restore
from tests.compile_cache.support import KEY, OTHER_KEY, TRITON_KERNEL, Machine, some_bytes, unfinished


def test_a_cache_moves_to_another_machine(first: Machine, second: Machine) -> None:
    assert first.save().status == "saved"
    outcome = second.restore()
    assert (outcome.status, outcome.files) == ("restored", 4)
    assert second.content() == first.content()


def test_times_are_kept_to_the_nanosecond_and_directories_are_private(first: Machine, second: Machine) -> None:
    first.save()
    second.restore()
    kernel = second.directories["inductor"] / "ab/kernel.so"
    assert kernel.stat().st_mtime_ns == 1_700_000_000_123_456_789
    assert second.directories["inductor"].stat().st_mode & 0o777 == 0o700
    assert kernel.parent.stat().st_mode & 0o777 == 0o700


def test_a_second_restore_and_a_second_save_do_nothing(first: Machine, second: Machine) -> None:
    first.save()
    second.restore()
    assert second.restore().status == "complete"
    assert second.save().status == "complete"
    assert first.save().status == "complete"
    assert len(first.packs()) == 1


def test_a_save_adds_only_what_the_store_does_not_have(first: Machine, second: Machine, tmp_path: Path) -> None:
    first.save()
    second.restore()
    second.write("inductor/cd/more.so", b"more")
    assert second.save().files == 1
    third = Machine(tmp_path / "third", first.store.directory)
    assert third.restore().packs == 2
    assert third.content() == second.content()


def test_a_file_that_was_compiled_again_replaces_the_old_one(first: Machine, second: Machine) -> None:
    first.save()
    first.write("inductor/ab/kernel.so", b"better code")
    assert first.save().files == 1
    second.restore()
    assert second.content()["inductor/ab/kernel.so"] == b"better code"


def test_equal_content_is_not_saved_again(first: Machine) -> None:
    first.save()
    os.utime(first.directories["inductor"] / "ab/kernel.so")
    assert first.save().status == "complete"


def test_what_is_there_is_never_overwritten(first: Machine, second: Machine) -> None:
    first.save()
    second.write("inductor/ab/kernel.so", b"mine")
    outcome = second.restore()
    assert outcome.files == 3
    assert second.content()["inductor/ab/kernel.so"] == b"mine"


def test_another_key_finds_nothing(first: Machine, second: Machine) -> None:
    first.save()
    assert second.restore(OTHER_KEY).status == "nothing"


def test_temporary_files_locks_and_what_is_of_one_machine_stay_at_home(first: Machine, second: Machine) -> None:
    for path in (
        "inductor/locks/a.lock",
        "inductor/x.tmp",
        "triton/tmp.pid_1_2/a",
        "inductor/.engine_loader/restore.lock",
    ):
        first.write(path, b"x")
    first.save()
    second.restore()
    assert len(second.content()) == 4


def test_links_inside_a_cache_are_kept_and_others_left(first: Machine, second: Machine) -> None:
    (first.directories["inductor"] / "ab/alias.so").symlink_to("kernel.so")
    (first.directories["inductor"] / "ab/away").symlink_to("/etc/passwd")
    first.save()
    second.restore()
    assert second.content()["inductor/ab/alias.so"] == b"kernel.so"
    assert "inductor/ab/away" not in second.content()


def test_tritons_group_files_move_with_their_root(first: Machine, second: Machine) -> None:
    kernel, group = TRITON_KERNEL.partition("/")[2], TRITON_KERNEL.replace("kernel.cubin", "__grp__kernel.json")
    old = str(first.directories["triton"] / kernel)
    first.write(group, json.dumps({"child_paths": {"kernel.cubin": old}}).encode())
    first.save()
    second.restore()
    there = json.loads(second.content()[group])
    assert there == {"child_paths": {"kernel.cubin": str(second.directories["triton"] / kernel)}}
    assert second.save().status == "complete"  # that it reads otherwise here is nothing new


def test_a_pack_is_an_archive_that_tar_reads(first: Machine, tmp_path: Path) -> None:
    long = "inductor/" + "d" * 90 + "/" + "f" * 120
    first.write(long, some_bytes(1000))
    first.save()
    (pack,) = first.packs()
    archive = tmp_path / "plain.tar"
    with pack.open("rb") as packed, archive.open("wb") as plain:
        plain.write(zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True).read())
    with tarfile.open(archive) as members:
        content = {member.name: members.extractfile(member).read() for member in members}  # type: ignore[union-attr]
        times = {member.name: member.pax_headers["mtime"] for member in members}
    assert content == first.content()
    assert times["inductor/ab/kernel.so"] == "1700000000.123456789"
    listed = subprocess.run(["tar", "tf", archive], capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted(listed) == sorted(content)


def test_large_and_many_files_go_through_several_frames(first: Machine, second: Machine) -> None:
    for number in range(200):
        first.write(f"inductor/many/{number}", some_bytes(number * 500, number))
    first.write("inductor/large", some_bytes(20 << 20))
    first.save()
    second.restore()
    assert second.content() == first.content()


def test_a_full_disk_ends_a_restore_before_it_begins(first: Machine, second: Machine) -> None:
    first.save()
    with pytest.raises(CacheOperationInterrupted, match="min_local_free_bytes"):
        second.restore(least_free_bytes=1 << 60)
    assert second.content() == {}


def test_a_restore_that_is_given_up_leaves_nothing(first: Machine, second: Machine) -> None:
    first.save()
    with pytest.raises(CacheOperationInterrupted, match="given up"):
        Restore(first.store, KEY, second.directories, first.trust, threads=2, may_go_on=lambda: False).run()
    assert second.content() == {}
    assert not list(second.directories["inductor"].glob(".engine_loader/restore-*"))


def test_a_pack_that_would_be_too_large_is_given_up(first: Machine) -> None:
    first.write("inductor/large", some_bytes(3 << 20))
    with pytest.raises(CacheOperationInterrupted, match="MAX_CACHE_SIZE_MB"):
        first.save(most_bytes=1 << 20)
    assert unfinished(first.store) == []
    assert first.packs() == []


def test_a_local_cache_that_others_may_write_is_left_alone_and_the_others_are_restored(
    first: Machine, second: Machine
) -> None:
    first.save()
    second.directories["inductor"].mkdir(parents=True)
    second.directories["inductor"].chmod(0o777)
    outcome = second.restore()
    assert (outcome.status, outcome.files) == ("restored", 1)
    assert "others may write it" in outcome.messages[0]
    assert set(second.content()) == {TRITON_KERNEL}


def test_a_local_cache_that_cannot_be_made_is_left_alone(first: Machine, second: Machine) -> None:
    first.save()
    second.directories["triton"].parent.mkdir(parents=True)
    second.directories["triton"].write_bytes(b"a file where a directory is meant")
    outcome = second.restore()
    assert (outcome.status, outcome.files) == ("restored", 3)
    assert "the cache triton is left alone" in outcome.messages[0]


class TestWhatIsThereAlready:
    """A restore puts nothing into a place of a local cache that others may write, or that leads elsewhere."""

    @pytest.fixture
    def place(self, first: Machine, second: Machine) -> Path:
        first.save()
        place = second.directories["inductor"] / "ab"
        place.mkdir(parents=True, mode=0o700)
        return place

    def test_a_directory_that_others_may_write_is_left_alone_and_told(
        self, first: Machine, second: Machine, place: Path
    ) -> None:
        place.chmod(0o777)
        outcome = second.restore()
        assert outcome.messages == [f"{place}: is left alone: others may write it (mode 777), and caches are code"]
        assert list(place.iterdir()) == []
        assert TRITON_KERNEL in second.content()
        assert outcome.files == 3

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
    def test_a_directory_of_another_user_is_left_alone(self, second: Machine, place: Path) -> None:
        os.chown(place, 12345, 12345)
        assert "it belongs to user 12345" in second.restore().messages[0]
        assert list(place.iterdir()) == []

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link away")
    def test_a_link_of_another_user_is_not_followed(self, second: Machine, place: Path, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        place.rmdir()
        place.symlink_to(tmp_path / "elsewhere")
        os.lchown(place, 12345, 12345)
        outcome = second.restore()
        assert "is left alone" in outcome.messages[0]
        assert list((tmp_path / "elsewhere").iterdir()) == []

    def test_a_link_that_would_lead_out_by_way_of_another_is_not_put_there(
        self, first: Machine, second: Machine, tmp_path: Path
    ) -> None:
        """Both are harmless by themselves: `out -> deep/further`, and `deep`, which somebody made a link away."""
        first.write("inductor/cd/deep/further/kernel.so", b"code")
        (first.directories["inductor"] / "cd/out").symlink_to("deep/further")
        first.save()
        (tmp_path / "elsewhere/further").mkdir(parents=True)
        (second.directories["inductor"] / "cd").mkdir(parents=True, mode=0o700)
        (second.directories["inductor"] / "cd/deep").symlink_to(tmp_path / "elsewhere")
        outcome = second.restore()
        assert any("it would lead out of its directory" in message for message in outcome.messages)
        assert not (second.directories["inductor"] / "cd/out").is_symlink()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link away")
    def test_a_link_of_another_user_in_the_place_of_a_cache_is_refused(
        self, first: Machine, second: Machine, tmp_path: Path
    ) -> None:
        first.save()
        (tmp_path / "disk").mkdir(mode=0o700)
        second.directories["inductor"].parent.mkdir(parents=True)
        second.directories["inductor"].symlink_to(tmp_path / "disk")
        os.chown(second.directories["inductor"], 12345, 12345, follow_symlinks=False)
        outcome = second.restore()
        assert "it is a link of user 12345" in outcome.messages[0]
        assert list((tmp_path / "disk").iterdir()) == []

    def test_a_link_in_the_place_of_a_cache_is_followed_where_the_user_made_it(
        self, first: Machine, second: Machine, tmp_path: Path
    ) -> None:
        first.save()
        (tmp_path / "disk").mkdir(mode=0o700)
        second.directories["inductor"].parent.mkdir(parents=True)
        second.directories["inductor"].symlink_to(tmp_path / "disk")
        assert second.restore().files == 4
        assert (tmp_path / "disk/ab/kernel.so").read_bytes() == b"code" * 1000


def test_links_that_leave_their_directory_by_a_chain_are_neither_saved_nor_restored(
    first: Machine, second: Machine
) -> None:
    """`a/b/c -> ../..`, `out -> a/b/c/../..`: each stays in the cache when the other is not looked at."""
    (first.directories["inductor"] / "a/b").mkdir(parents=True)
    (first.directories["inductor"] / "a/b/c").symlink_to("../..")
    (first.directories["inductor"] / "out").symlink_to("a/b/c/../..")
    first.save()
    second.restore()
    assert not {"inductor/a/b/c", "inductor/out"} & set(second.content())
