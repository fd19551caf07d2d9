"""A store deletes, lists and counts nothing that is not its own."""

import json
import os
import time
from pathlib import Path

import pytest

from engine_loader.compile_cache.cache_errors import CacheValidationError
from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.process.operations import perform
from engine_loader.compile_cache.retention import GRACE_S, Policy, prune
from engine_loader.compile_cache.stores.filesystem import FilesystemStore
from engine_loader.compile_cache.stores.marker import adopt
from engine_loader.compile_cache.stores.object_names import MARKER, kind_of
from tests.compile_cache.support import KEY, SECRET, Machine
from tests.compile_cache.test_stores import job, settings_for

NOTHING_LEFT = Policy(days=1e-9, keys=1, bytes=1, unfinished_s=0)
MONTH_S = 31 * 86400


def snapshot(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in directory.rglob("*")
    }


def make_foreign(store: Path) -> Path:
    """Files and directories of other people in a store's directory."""
    place = store / "foreign"
    for name in ("backups/2025/db.tar.zst", "a/b/index", "a/b/used-2025-01-01", f"x_{'0' * 11}/s/{'0' * 64}.tar.zst"):
        path = store / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"somebody's")
        os.utime(path, (time.time() - MONTH_S,) * 2)
    (store / "notes.tar.zst").write_bytes(b"somebody's")
    (store / "empty" / "directory").mkdir(parents=True)
    return place


def test_prune_leaves_what_others_keep_in_the_directory(first: Machine, store: Path) -> None:
    first.save()
    make_foreign(store)
    (pack,) = first.packs()
    (pack.parent / "README").write_bytes(b"x")
    (pack.parent / "model.tar.zst").write_bytes(b"x")
    before = snapshot(store)
    done = prune(first.store, NOTHING_LEFT, SECRET, now=time.time() + MONTH_S)
    assert [name for name, _, _ in done.deleted] == [f"{KEY.prefix}/{pack.name}"]
    ours = {name for name in before if kind_of(name) not in ("foreign", "marker")}
    assert snapshot(store) == {name: content for name, content in before.items() if name not in ours}


def test_what_others_keep_is_not_listed(first: Machine, store: Path) -> None:
    first.save()
    listed = first.store.list()
    make_foreign(store)
    assert first.store.list() == listed
    assert {entry.key_prefix for entry in first.store.entries()} == {"", KEY.prefix}


def test_a_directory_that_is_not_empty_is_refused_until_it_is_adopted(first: Machine, store: Path) -> None:
    store.mkdir(mode=0o700)
    (store / "thesis.doc").write_bytes(b"years of work")
    for action in ("restore", "save"):
        outcome = perform(job(action, first), settings_for(store))
        assert outcome.status == "refused"
        assert "engine-loader compile-cache adopt" in outcome.messages[0]
        assert str(store) in outcome.messages[0]
    assert [path.name for path in store.iterdir()] == ["thesis.doc"]
    with pytest.raises(CacheValidationError, match="adopt"):
        prune(FilesystemStore(store, SECRET), NOTHING_LEFT, SECRET)
    assert adopt(FilesystemStore(store, SECRET), "production") == "production"
    assert perform(job("save", first), settings_for(store)).status == "saved"
    assert json.loads((store / MARKER).read_text())["store"] == "production"
    assert (store / "thesis.doc").read_bytes() == b"years of work"


def test_a_fresh_volume_is_empty(first: Machine, store: Path) -> None:
    (store / "lost+found").mkdir(parents=True, mode=0o700)
    store.chmod(0o700)
    assert perform(job("save", first), settings_for(store)).status == "saved"


def test_a_store_keeps_the_name_that_it_has(store: Path) -> None:
    one = FilesystemStore(store, SECRET)
    one.found()
    assert one.name == FilesystemStore(store, SECRET).name
    with pytest.raises(CacheValidationError, match="already"):
        adopt(FilesystemStore(store, SECRET), "another")


def test_a_store_with_another_name_than_the_settings_say_is_refused(first: Machine, store: Path) -> None:
    settings = settings_for(store, store_name="production")
    assert perform(job("save", first), settings).status == "saved"
    outcome = perform(job("restore", first), settings.model_copy(update={"store_name": "staging"}))
    assert outcome.status == "refused"
    assert "'production'" in outcome.messages[0] and "'staging'" in outcome.messages[0]


def test_a_pack_of_another_store_is_refused(first: Machine, second: Machine, tmp_path: Path) -> None:
    staging = Machine(tmp_path / "first", tmp_path / "staging")
    staging.save()
    first.store.found()
    (pack,) = staging.packs()
    target = first.store.directory / KEY.prefix
    target.mkdir(parents=True, mode=0o700)
    (target / pack.name).write_bytes(pack.read_bytes())
    (target / "index").write_bytes((pack.parent / "index").read_bytes())
    assert second.restore().status == "refused"
    assert second.content() == {}


def test_a_marker_that_is_damaged_is_told(first: Machine, store: Path) -> None:
    first.save()
    (store / MARKER).write_text("{")
    outcome = perform(job("restore", first), settings_for(store))
    assert outcome.status == "refused"
    assert MARKER in outcome.messages[0] and "adopt" in outcome.messages[0]


class TestWhatDoesNotVerify:
    @pytest.fixture
    def junk(self, first: Machine, store: Path) -> list[Path]:
        """200 keys of one byte each, all newer than the honest one."""
        first.save()
        made = []
        for number in range(200):
            path = store / f"junk_{number:012x}" / "model" / f"{number:064x}.tar.zst"
            path.parent.mkdir(parents=True, mode=0o700)
            path.write_bytes(b"x")
            made.append(path)
        return made

    @pytest.mark.parametrize("policy", [Policy(30, 1, 1 << 40, 0), Policy(30, 200, 1, 0)])
    def test_it_evicts_no_honest_key(self, policy: Policy, junk: list[Path], first: Machine) -> None:
        assert prune(first.store, policy, SECRET, now=time.time() + 60).deleted == []
        assert len(first.packs()) == 1
        assert all(path.exists() for path in junk)

    def test_it_is_never_deleted_by_itself(self, junk: list[Path], first: Machine) -> None:
        prune(first.store, NOTHING_LEFT, SECRET, now=time.time() + MONTH_S)
        assert first.packs() == []
        assert all(path.exists() for path in junk)

    def test_it_is_deleted_on_request_and_nothing_else(self, junk: list[Path], first: Machine) -> None:
        done = prune(first.store, Policy(30, 200, 1 << 40, 0), SECRET, now=time.time() + GRACE_S + 1, unverified=True)
        assert len(done.deleted) == 200
        assert not any(path.exists() for path in junk)
        assert len(first.packs()) == 1

    def test_what_was_signed_with_another_key_stays_too(self, first: Machine, tmp_path: Path) -> None:
        from engine_loader.compile_cache.trust import Trust

        first.save()
        other = Machine(tmp_path / "other", first.store.directory, Trust(b"another secret, long enough"))
        other.write("inductor/x", b"x")
        other.save(CacheKey((("torch", "2.13.0"),), "other"))
        prune(other.store, NOTHING_LEFT, other.trust, now=time.time() + MONTH_S)
        assert len(first.packs()) == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"torch-2_0123456789ab/m/{'a' * 64}.tar.zst", "pack"),
        (f"torch-2_0123456789ab/m/{'A' * 64}.tar.zst", "foreign"),
        (f"torch-2_0123456789ab/../{'a' * 64}.tar.zst", "foreign"),
        (f"torch-2_0123456789/m/{'a' * 64}.tar.zst", "foreign"),
        ("backups/2025/db.tar.zst", "foreign"),
        ("torch-2_0123456789ab/m/used-2026-01-31", "used"),
        ("torch-2_0123456789ab/m/lease-save", "lease"),
        (f"torch-2_0123456789ab/m/suspect-{'a' * 64}", "suspect"),
        ("engine-loader-store.json", "marker"),
        ("index", "foreign"),
    ],
)
def test_names_say_what_is_ours(name: str, kind: str) -> None:
    assert kind_of(name) == kind
