"""What is not to be trusted is refused by name, and nothing of it touches the disk."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zstandard

from engine_loader.compile_cache.cache_errors import CacheValidationError
from engine_loader.compile_cache.packs import pack as pack_module
from engine_loader.compile_cache.packs.manifest import content_digest
from engine_loader.compile_cache.packs.tar import header, padding
from engine_loader.compile_cache.trust import Trust, load_trust
from engine_loader.compile_cache.trust.signatures import HmacKey
from tests.compile_cache.support import KEY, OTHER_KEY, SECRET, Machine

Row = list[Any]


def refused(machine: Machine, *words: str) -> None:
    """The restore refuses the pack, says so with these words, and leaves nothing."""
    outcome = machine.restore()
    assert outcome.status == "refused", outcome
    assert outcome.files == 0
    assert all(word in outcome.messages[0] for word in ("refused", *words)), outcome.messages
    assert machine.content() == {}


def test_a_changed_byte_anywhere_is_refused(first: Machine, second: Machine) -> None:
    first.save()
    (path,) = first.packs()
    (path.parent / "index").unlink()  # its copy of the pack's end would do
    sound = path.read_bytes()
    for position in range(len(sound)):
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 0x40]) + sound[position + 1 :])
        outcome = second.restore()
        assert (outcome.status, outcome.files) == ("refused", 0), (position, outcome)
        assert path.name in outcome.messages[0]
    path.write_bytes(sound)
    assert second.restore().status == "restored"


@pytest.mark.parametrize("missing", [1, 48, 200])
def test_a_pack_that_is_cut_short_is_refused(first: Machine, second: Machine, missing: int) -> None:
    first.save()
    (path,) = first.packs()
    path.write_bytes(path.read_bytes()[:-missing])
    refused(second, path.name)


def test_bytes_that_are_added_are_refused(first: Machine, second: Machine) -> None:
    first.save()
    (path,) = first.packs()
    path.write_bytes(b"more" + path.read_bytes())
    refused(second, path.name)


def test_a_pack_of_another_key_is_refused(first: Machine, second: Machine) -> None:
    first.save(OTHER_KEY)
    (path,) = first.packs(OTHER_KEY)
    target = first.store.directory / KEY.prefix
    target.mkdir(parents=True)
    (target / path.name).write_bytes(path.read_bytes())
    refused(second, "HMAC")  # which covers the key


def test_a_pack_without_a_signature_is_refused(first: Machine, store: Path, second: Machine, tmp_path: Path) -> None:
    unsigned = Machine(tmp_path / "first", store, Trust())
    unsigned.save()
    refused(second, "not signed")


def test_a_signature_of_another_key_file_is_refused(
    store: Path, first: Machine, second: Machine, tmp_path: Path
) -> None:
    Machine(tmp_path / "first", store, Trust(b"some other secret")).save()
    refused(second, "HMAC")


def test_a_signed_pack_is_refused_where_no_key_file_is_set(store: Path, first: Machine, tmp_path: Path) -> None:
    first.save()
    refused(Machine(tmp_path / "second", store, Trust()), "key_file")


def test_a_renamed_pack_is_refused(first: Machine, second: Machine) -> None:
    first.save()
    (path,) = first.packs()
    path.rename(path.with_name(f"{'0' * 64}.tar.zst"))
    refused(second, "HMAC")  # which covers the name


class TestWithoutAKeyFile:
    """Only what nobody else could have written counts."""

    @pytest.fixture
    def saved(self, tmp_path: Path, store: Path, first: Machine) -> Machine:
        machine = Machine(tmp_path / "first", store, Trust())
        machine.save()
        return machine

    @pytest.fixture
    def reader(self, tmp_path: Path, store: Path) -> Machine:
        return Machine(tmp_path / "second", store, Trust())

    def test_a_private_store_is_taken(self, saved: Machine, reader: Machine) -> None:
        assert reader.restore().status == "restored"

    @pytest.mark.parametrize("which", ["store", "key", "pack"])
    def test_what_others_may_write_is_refused(self, saved: Machine, reader: Machine, which: str) -> None:
        (path,) = saved.packs()
        {"store": saved.store.directory, "key": path.parent, "pack": path}[which].chmod(0o777)
        refused(reader, "others may write it", "compile_cache.trust=anyone")

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
    def test_a_pack_of_another_user_is_refused(self, saved: Machine, reader: Machine) -> None:
        (path,) = saved.packs()
        os.chown(path, 12345, 12345)
        refused(reader, "belongs to user 12345")

    def test_a_directory_above_that_others_may_write_is_refused(self, saved: Machine, reader: Machine) -> None:
        saved.store.directory.parent.chmod(0o777)
        try:
            refused(reader, "above it")
        finally:
            saved.store.directory.parent.chmod(0o700)

    def test_a_setting_allows_it(self, saved: Machine, store: Path, tmp_path: Path) -> None:
        (path,) = saved.packs()
        path.chmod(0o666)
        assert Machine(tmp_path / "second", store, Trust(anyone=True)).restore().status == "restored"

    def test_a_link_in_the_place_of_a_pack_is_not_followed(self, saved: Machine, reader: Machine) -> None:
        (path,) = saved.packs()
        elsewhere = path.rename(path.parent.parent.parent / "elsewhere")
        path.symlink_to(elsewhere)
        assert reader.restore().status == "nothing"


def forge(machine: Machine, change: Callable[[dict[str, Any]], None], archive: bytes | None = None) -> None:
    """Put a well-signed pack into the store whose manifest says what an honest one never says."""
    content = b"hello"
    head = header("inductor/a", len(content), 1, 0o644)
    archive = head + content + bytes(padding(len(content))) if archive is None else archive
    frame = zstandard.ZstdCompressor().compress(archive)
    row: Row = ["inductor/a", 5, 1, 0o644, hashlib.sha256(content).hexdigest(), 0, 0, "", -1]
    value = {
        "format": 2,
        "key": KEY.to_json(),
        "created": 1.0,
        "host": "",
        "roots": {},
        "factors": {},
        "replaces": [],
        "hosts": [],
        "generation": 0,
        "frames": [[0, len(frame), len(archive), hashlib.sha256(frame).hexdigest()]],
        "files": [row],
    }
    change(value)
    digest = "0" * 64
    with suppress(KeyError, IndexError, TypeError):  # of a manifest that is refused before its name is compared
        digest = content_digest(KEY, value["files"], [])
    machine.store.found()
    name = f"{KEY.prefix}/{digest}.tar.zst"
    path = machine.store.directory / name
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.write_bytes(frame + pack_module.make_tail(json.dumps(value).encode(), machine.store.name, name, SECRET))


def set_file(column: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][0][column] = value

    return change


def link_to(target: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][0][1], manifest["files"][0][4], manifest["files"][0][7] = 0, "", target

    return change


def twice(manifest: dict[str, Any]) -> None:
    manifest["files"].append(manifest["files"][0])


def below_a_file(manifest: dict[str, Any]) -> None:
    row = list(manifest["files"][0])
    row[0] = "inductor/a/b"
    row[6] = manifest["frames"][0][2]
    manifest["files"].append(row)


def bomb(manifest: dict[str, Any]) -> None:
    manifest["frames"][0][2] += 512
    manifest["files"][0][1] += 512


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "absolute": (set_file(0, "/etc/cron.d/x"), "it is absolute"),
    "upwards": (set_file(0, "inductor/../../x"), "`..`"),
    "dot": (set_file(0, "inductor/./x"), "`..`"),
    "no cache": (set_file(0, "x"), "names no cache"),
    "nul": (set_file(0, "inductor/a\0b"), "characters"),
    "set-uid": (set_file(3, 0o4755), "set-uid"),
    "device": (set_file(3, 0o060644), "set-uid and the like"),
    "link away": (link_to("../../etc/passwd"), "leaves its directory"),
    "link upwards": (link_to("b/../c"), "leaves its directory"),
    "absolute link": (link_to("/etc/passwd"), "absolute"),
    "duplicate": (twice, "twice"),
    "below a file": (below_a_file, "which is a file"),
    "bomb": (bomb, "another size"),
    "offset": (set_file(6, 512), "does not lie"),
    "another frame": (set_file(5, 3), "does not lie"),
    "negative": (set_file(1, -1), "cannot be read"),
    "another name in the archive": (set_file(0, "inductor/b"), "the archive says something else"),
    "another mode in the archive": (set_file(3, 0o755), "the archive says something else"),
    "another format": (lambda manifest: manifest.update(format=9), "its format is 9"),
    "no files": (lambda manifest: manifest.pop("files"), "cannot be read"),
    "too many bytes": (set_file(1, 1 << 50), "too large"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused(kind: str, second: Machine, tmp_path: Path) -> None:
    change, words = HOSTILE[kind]
    forge(second, change)
    outcome = second.restore()
    assert outcome.status == "refused", outcome
    assert words in outcome.messages[0]
    assert second.content() == {}


def test_the_forgery_without_a_change_is_restored(second: Machine) -> None:
    """So that the tests above refuse what they mean to refuse."""
    forge(second, lambda _manifest: None)
    assert second.restore().status == "restored"


def test_a_frame_that_says_less_than_it_holds_is_no_bomb(second: Machine) -> None:
    head = header("inductor/a", 5, 1, 0o644)
    forge(second, lambda manifest: manifest["frames"][0].__setitem__(2, len(head) + 512), head + bytes(100 << 20))
    outcome = second.restore()
    assert outcome.status == "refused"
    assert "would become" in outcome.messages[0]


def test_no_file_of_a_refused_frame_stays(second: Machine) -> None:
    """The archive's second file has another name than in the manifest; the first was written by then."""
    content = b"hello"
    archive = b"".join(
        header(path, len(content), 1, 0o644) + content + bytes(padding(len(content)))
        for path in ("inductor/a", "inductor/b")
    )

    def second_file(manifest: dict[str, Any]) -> None:
        manifest["files"].append(["inductor/c", *manifest["files"][0][1:6], len(archive) // 2, "", -1])

    forge(second, second_file, archive)
    outcome = second.restore()
    assert (outcome.status, outcome.files) == ("refused", 0)
    assert second.content() == {}


def test_a_bad_pack_does_not_keep_a_good_one_from_being_restored(first: Machine, second: Machine) -> None:
    first.save()
    forge(second, set_file(0, "/etc/x"))
    outcome = second.restore()
    assert (outcome.status, outcome.files, len(outcome.messages)) == ("restored", 4, 1)


class TestKeyFile:
    def test_white_space_around_the_secret_does_not_count(self, tmp_path: Path) -> None:
        path = tmp_path / "key"
        path.write_text("  a secret of some length \n")
        path.chmod(0o600)
        assert load_trust(str(path)).keys == (HmacKey(b"a secret of some length"),)

    def test_a_short_one_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "key"
        path.write_text("short")
        path.chmod(0o600)
        with pytest.raises(CacheValidationError, match="urandom"):
            load_trust(str(path))

    def test_one_that_others_may_write_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "key"
        path.write_text("a secret of some length")
        path.chmod(0o666)
        with pytest.raises(CacheValidationError, match="chmod 600"):
            load_trust(str(path))

    def test_one_that_is_missing_is_an_error_with_its_name(self, tmp_path: Path) -> None:
        with pytest.raises(CacheValidationError, match=str(tmp_path / "key")):
            load_trust(str(tmp_path / "key"))
