"""What is put together, pruned and cleaned up, and what never is."""

import os
import time
from pathlib import Path

from engine_loader.compile_cache.compaction import compact
from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.retention import GRACE_S, Policy, prune
from tests.compile_cache.support import KEY, Machine, some_bytes

KEEP_ALL = Policy(days=30, keys=100, bytes=1 << 40, unfinished_s=3600)


def key(number: int) -> CacheKey:
    return CacheKey((("torch", "2.13.0"),), f"model-{number}")


def test_a_compaction_holds_everything_and_replaces_its_packs_after_a_while(first: Machine, second: Machine) -> None:
    for number in range(5):
        first.write(f"inductor/new/{number}", some_bytes(100_000, number))
        if number == 3:
            first.write("inductor/new/0", b"changed")
        first.save()
    assert len(first.packs()) == 5
    made = compact(first.store, KEY, first.trust, level=1)
    assert made is not None
    assert len(made.manifest.files) == len(first.content())
    assert len(first.packs()) == 6
    prune(first.store, KEEP_ALL, first.trust)
    assert len(first.packs()) == 6  # whoever listed the old ones may still be reading
    prune(first.store, KEEP_ALL, first.trust, now=time.time() + GRACE_S + 1)
    assert [path.name.partition(".")[0] for path in first.packs()] == [made.stored.digest]
    second.restore()
    assert second.content() == first.content()
    assert first.save().status == "complete"


def test_a_compaction_of_one_pack_is_none(first: Machine) -> None:
    first.save()
    assert compact(first.store, KEY, first.trust, level=1) is None


def test_keys_that_are_not_used_go_by_age(first: Machine) -> None:
    for number in range(3):
        first.save(key(number))
    (old,) = first.packs(key(0))
    long_ago = time.time() - 40 * 86400
    os.utime(old, (long_ago, long_ago))
    done = prune(first.store, KEEP_ALL, first.trust)
    assert [reason for _, _, reason in done.deleted] == ["not used for 40 days"]
    assert first.packs(key(0)) == []
    assert not old.parent.exists()
    assert first.packs(key(1)) and first.packs(key(2))


def test_the_last_used_keys_stay_when_there_are_too_many_or_too_much(first: Machine) -> None:
    for number in range(4):
        first.save(key(number))
        (path,) = first.packs(key(number))
        os.utime(path, (time.time() - 100 + number,) * 2)
    size = first.packs(key(3))[0].stat().st_size
    prune(first.store, Policy(30, 3, 1 << 40, 3600), first.trust)
    assert [bool(first.packs(key(number))) for number in range(4)] == [False, True, True, True]
    prune(first.store, Policy(30, 3, size + 10, 3600), first.trust)
    assert [bool(first.packs(key(number))) for number in range(4)] == [False, False, False, True]


def test_leftovers_go_by_age_and_nothing_else_is_touched(first: Machine, store: Path) -> None:
    first.save()
    (pack,) = first.packs()
    old, new = pack.parent / f".unfinished-{1:032x}", pack.parent / f".unfinished-{2:032x}"
    note = pack.parent / "README"
    for path in (old, new, note):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    os.utime(note, (time.time() - 1e9,) * 2)
    prune(first.store, KEEP_ALL, first.trust)
    assert not old.exists()
    assert new.exists() and note.exists() and pack.exists()


def test_a_dry_run_deletes_nothing(first: Machine) -> None:
    first.save()
    done = prune(first.store, Policy(30, 1, 1 << 40, 0), first.trust, now=time.time() + 1e9, dry_run=True)
    assert len(done.deleted) == 1
    assert len(first.packs()) == 1


def test_a_pack_that_is_not_to_be_trusted_replaces_nothing(first: Machine, tmp_path: Path) -> None:
    first.save()
    first.write("inductor/more", b"more")
    first.save()
    from engine_loader.compile_cache.trust import Trust

    liar = Machine(tmp_path / "first", first.store.directory, Trust(b"another secret, not ours"))
    assert compact(liar.store, KEY, liar.trust, level=1) is None  # it can read none of them
    forged = Machine(tmp_path / "liar", first.store.directory, liar.trust)
    forged.write("inductor/a", b"a")
    forged.save()
    forged.write("inductor/b", b"b")
    forged.save()
    assert compact(forged.store, KEY, forged.trust, level=1) is not None
    prune(first.store, KEEP_ALL, first.trust, now=time.time() + GRACE_S + 1)
    assert len(first.packs()) == 5
