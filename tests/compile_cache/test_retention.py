"""What is put together, pruned and cleaned up, and what never is."""

import hashlib
import json
import os
import time
from pathlib import Path

from engine_loader.compile_cache.compaction import compact
from engine_loader.compile_cache.host.groups import HostGroup
from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.packs.key_packs import effective_files, files_for, read_key, update_index
from engine_loader.compile_cache.packs.manifest import Frame, Manifest, PackedFile
from engine_loader.compile_cache.packs.packing import write_pack
from engine_loader.compile_cache.retention import GRACE_S, Policy, prune
from engine_loader.compile_cache.trust import Trust
from engine_loader.compile_cache.trust.denied import DenyList
from tests.compile_cache.support import KEY, Machine, scan_any, some_bytes

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


MONTH_AGO_S = 31 * 86400.0


def aged(path: Path, seconds: float = MONTH_AGO_S) -> Path:
    """The same file, written so many seconds earlier in the store's time."""
    when = time.time() - seconds
    os.utime(path, (when, when))
    return path


def test_packs_that_are_refused_go_by_age_though_their_key_is_in_use(first: Machine) -> None:
    """Known to be this store's: a key of this node has signed what is denied, too old or damaged."""
    first.save()
    (denied,) = first.packs()
    first.write("inductor/more.so", b"more")
    first.save()
    (damaged,) = set(first.packs()) - {denied}
    first.write("inductor/most.so", b"most")
    first.save()
    content = bytearray(damaged.read_bytes())
    content[-150] ^= 1  # in the manifest: its digest is signed
    damaged.write_bytes(content)
    trust = Trust(first.trust.keys, denied=DenyList(1, {denied.name.partition(".")[0]: "bad"}))
    (damaged.parent / "index").unlink()  # it has the sound end
    update_index(first.store, KEY.prefix, trust)
    kept = set(first.packs())
    prune(first.store, KEEP_ALL, trust)
    assert set(first.packs()) == kept
    for path in (aged(denied, MONTH_AGO_S - 3 * 86400), aged(damaged)):
        assert path.exists()
    done = prune(first.store, KEEP_ALL, trust)
    assert [(name.rpartition("/")[2], reason) for name, _, reason in done.deleted] == [
        (damaged.name, "refused, and written 31 days ago")
    ]
    aged(denied)
    prune(first.store, KEEP_ALL, trust)
    assert set(first.packs()) == kept - {denied, damaged}


def test_what_is_no_pack_or_another_users_stays(first: Machine) -> None:
    first.save()
    (sound,) = first.packs()
    foreign = sound.with_name(f"{'1' * 64}.tar.zst")
    foreign.write_bytes(b"no pack at all" * 100)
    others = sound.with_name(f"{'2' * 64}.tar.zst")
    others.write_bytes(sound.read_bytes()[:-200] + Trust(b"of somebody else, unknown").sign(b"") + bytes(96))
    stranger = sound.with_name(f"{'3' * 64}.tar.zst")
    stranger.write_bytes(sound.read_bytes()[100:])
    if os.geteuid() == 0:
        os.chown(stranger, 12345, 12345)
    else:
        stranger.unlink()
    left = {path for path in (foreign, others, stranger) if path.exists()}
    for path in left:
        aged(path, 400 * 86400)
    prune(first.store, KEEP_ALL, first.trust)
    assert {path for path in left if path.exists()} == left


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


def damage(pack: Path) -> None:
    """Change a byte in the pack's first frame."""
    content = bytearray(pack.read_bytes())
    content[50] ^= 1
    pack.write_bytes(content)


def test_a_damaged_pack_is_left_out_of_a_compaction_and_keeps_its_name(first: Machine, second: Machine) -> None:
    for number in range(4):
        first.write(f"inductor/new/{number}", some_bytes(300_000, number))
        first.save()
    newest = max(first.store.list(), key=lambda stored: (stored.modified, stored.name))
    damage(first.store.directory / newest.name)
    made = compact(first.store, KEY, first.trust, level=1)
    assert made is not None
    assert newest.digest not in made.manifest.replaces
    assert len(made.manifest.replaces) == 3
    prune(first.store, KEEP_ALL, first.trust, now=time.time() + GRACE_S + 1)
    assert {path.name.partition(".")[0] for path in first.packs()} == {made.stored.digest, newest.digest}


def test_a_far_larger_pack_is_not_written_again(first: Machine, second: Machine) -> None:
    first.write("inductor/large", some_bytes(2_000_000))
    first.save()
    (large,) = first.store.list()
    for number in range(3):
        first.write(f"inductor/new/{number}", some_bytes(1000, number))
        first.save()
    first.write("inductor/large", some_bytes(1000, 99))
    first.save()
    made = compact(first.store, KEY, first.trust, level=1, more_than=3)
    assert made is not None
    assert large.digest not in made.manifest.replaces
    assert made.stored.size < 100_000
    assert second.restore().status == "restored"
    assert second.content() == first.content()


def test_packs_of_pods_with_other_directories_are_put_together(tmp_path: Path, store: Path, second: Machine) -> None:
    for number in range(5):
        pod = Machine(tmp_path / f"pod-{number}", store)
        pod.restore()
        pod.write(f"triton/k{number}/k.cubin", some_bytes(1000, number))
        group = {"child_paths": {"k.cubin": f"{pod.directories['triton']}/k{number}/k.cubin"}}
        pod.write(f"triton/k{number}/__grp__k.json", json.dumps(group).encode())
        assert pod.save().files == 2
    made = compact(pod.store, KEY, pod.trust, level=1)
    assert made is not None
    assert len(made.manifest.replaces) == 5
    prune(pod.store, KEEP_ALL, pod.trust, now=time.time() + GRACE_S + 1)
    assert second.restore().files == 10
    for number in range(5):
        group = json.loads(second.content()[f"triton/k{number}/__grp__k.json"])
        assert group["child_paths"]["k.cubin"] == str(second.directories["triton"] / f"k{number}/k.cubin")
    assert second.save().status == "complete"
    assert pod.save().status == "complete"


def test_files_of_several_hosts_stand_side_by_side(first: Machine) -> None:
    """Each pack was made on another host; the same path is there for both, and a file for any host."""
    groups = [HostGroup.of({"isa": f"avx{number}"}) for number in range(2)]
    here, there = (group.hash for group in groups)
    for number, group in enumerate(groups):
        first.write("inductor/host.so", f"for host {number}".encode())
        first.write("inductor/any.so", b"for any host")
        save_for(first, group, number)
    made = compact(first.store, KEY, first.trust, level=1)
    assert made is not None
    assert sorted(made.manifest.hosts) == sorted(groups)
    found = effective_files(read_key(first.store, KEY.prefix, first.trust).packs)
    assert {name for name in found if "host.so" in name[0]} == {
        ("inductor/host.so", here),
        ("inductor/host.so", there),
    }
    packs = read_key(first.store, KEY.prefix, first.trust).packs
    sizes = {host: {path.rpartition("/")[2] for path in files_for(packs, host)} for host in ("", here, there, "other")}
    assert sizes == {
        "": {"any.so"},
        here: {"any.so", "host.so"},
        there: {"any.so", "host.so"},
        "other": {"any.so"},
    }
    digests = {host: files_for(packs, host)["inductor/host.so"][1].sha256 for host in (here, there)}
    assert digests[here] == hashlib.sha256(b"for host 0").hexdigest()
    assert digests[there] == hashlib.sha256(b"for host 1").hexdigest()


def save_for(machine: Machine, group: HostGroup, number: int) -> None:
    """Save two files, of which one holds for a host of ``group`` only."""
    names = ("inductor/any.so", "inductor/host.so")
    files = [file for file in scan_any(machine.directories) if file.path in names]

    def describe(packed: tuple[PackedFile, ...], frames: tuple[Frame, ...]) -> Manifest:
        rows = tuple(file._replace(host=0) if file.path.endswith("host.so") else file for file in packed)
        return Manifest(KEY, machine.store.now() + number, rows, frames, hosts=(group,))

    machine.store.found()
    pack = write_pack(machine.store, describe, KEY, files, machine.trust, threads=1, level=1, most_bytes=1 << 40)
    assert pack is not None
