"""The compile cache with its store in a bucket."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from engine_loader.compile_cache.cache_errors import CacheValidationError
from engine_loader.compile_cache.compaction import compact
from engine_loader.compile_cache.process.job import Job
from engine_loader.compile_cache.process.operations import perform
from engine_loader.compile_cache.process.session import run_job
from engine_loader.compile_cache.retention import Policy, prune
from engine_loader.compile_cache.stores import objects as object_store
from engine_loader.compile_cache.stores.interface import Stored
from engine_loader.compile_cache.stores.leases import acquire
from engine_loader.compile_cache.stores.marker import adopt
from engine_loader.compile_cache.stores.objects import ObjectCacheStore
from engine_loader.compile_cache.stores.opening import open_store
from engine_loader.compile_cache.stores.uses import note_used
from engine_loader.compile_cache.trust import Trust
from engine_loader.compile_cache.trust.denied import DenyList
from engine_loader.compile_cache.trust.signatures import HmacKey
from engine_loader.compile_cache.upkeep.resign import resign
from engine_loader.settings import CompileCacheSettings
from tests.cli.running import invoke
from tests.compile_cache.support import KEY, OTHER_KEY, SECRET, TRITON_KERNEL, Machine, some_bytes
from tests.support.fault_server import Answer, FaultServer
from tests.support.s3_server import S3Server


@pytest.fixture
def url(on_s3: S3Server) -> str:
    """A prefix of its own for each test."""
    on_s3.make_bucket("caches")
    return f"s3://caches/fleet/{uuid4().hex}"


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "scratch"
    place.mkdir()
    yield place
    assert not list(place.iterdir())


@pytest.fixture
def first(tmp_path: Path, url: str, scratch: Path) -> Machine:
    machine = on_objects(Machine(tmp_path / "first", tmp_path), url, scratch)
    machine.write("inductor/ab/kernel.so", some_bytes(300_000), mtime_ns=1_700_000_000_123_456_789)
    machine.write("triton/XYZAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA/kernel.cubin", bytes(range(256)))
    return machine


@pytest.fixture
def second(tmp_path: Path, url: str, scratch: Path) -> Machine:
    return on_objects(Machine(tmp_path / "second", tmp_path), url, scratch)


def on_objects(machine: Machine, url: str, scratch: Path) -> Machine:
    machine.store = ObjectCacheStore(url, SECRET, str(scratch))  # type: ignore[assignment]
    return machine


def test_what_one_machine_saves_another_restores(first: Machine, second: Machine) -> None:
    assert second.restore().status == "nothing"
    assert first.save().status == "saved"
    assert first.save().status == "complete"
    assert second.restore().status == "restored"
    assert second.content() == first.content()
    assert first.restore(OTHER_KEY).status == "nothing"


def test_packs_are_put_together_and_pruned(first: Machine, second: Machine) -> None:
    first.save()
    first.write("inductor/cd/more.so", b"more")
    first.save()
    assert len(list(first.store.list(KEY.prefix))) == 2
    assert compact(first.store, KEY, SECRET, level=1) is not None
    assert second.restore().status == "restored"
    assert second.content() == first.content()
    prune(first.store, Policy(1e-9, 1, 1, 0), SECRET, now=first.store.now() + 1)
    assert list(first.store.list()) == []


def test_a_name_that_exists_stays_as_it_is(first: Machine, tmp_path: Path) -> None:
    path = tmp_path / "pack"
    name = f"{KEY.prefix}/{'ab' * 32}.tar.zst"
    for content in (b"the first", b"the second"):
        path.write_bytes(content)
        first.store.put(name, str(path))  # type: ignore[attr-defined]
    with first.store.open(name) as pack:
        assert pack.read(0, pack.size) == b"the first"
    first.store.delete(name)
    first.store.delete(name)
    assert list(first.store.list()) == []
    with pytest.raises(FileNotFoundError), first.store.open(name):
        pass


@pytest.mark.parametrize("refusal", [None, Answer(status=501, code="NotImplemented"), Answer(status=412)])
def test_a_server_that_does_not_know_conditional_writes(
    refusal: Answer | None, first: Machine, on_server: FaultServer, tmp_path: Path
) -> None:
    store = ObjectCacheStore("s3://bucket/caches", SECRET, str(tmp_path))
    store.found()
    del on_server.objects["bucket/caches/engine-loader-store.json"]
    on_server.fault = lambda request: refusal if "if-none-match" in request.headers else None
    with store.upload(KEY.prefix) as upload:
        upload.write(b"content")
        upload.commit(f"{KEY.prefix}/{'ab' * 32}.tar.zst")
    stays = refusal is not None and refusal.status == 412
    assert on_server.objects == ({} if stays else {f"bucket/caches/{KEY.prefix}/{'ab' * 32}.tar.zst": b"content"})


def test_a_large_pack_goes_up_in_parts(first: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_WHOLE_BYTES", 1 << 20)
    content, name = some_bytes(6 << 20), f"{KEY.prefix}/{'ab' * 32}.tar.zst"
    with first.store.upload(KEY.prefix) as upload:
        upload.write(content)
        upload.commit(name)
    with first.store.open(name) as pack:
        assert pack.read(1000, pack.size - 1000) == content[1000:]


def test_the_command_lists_and_prunes_it(first: Machine, url: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"sixteen bytes or more")
    (tmp_path / "key").chmod(0o600)
    first.save()
    time.sleep(1.1)  # the store's times are whole seconds, and a day is far too long to wait for
    env = {"B10FS_CACHE_DIR": url, "ENGINE_LOADER_COMPILE_CACHE__KEY_FILE": str(tmp_path / "key")}
    assert "model_tp1" in invoke("compile-cache", "list", env=env).output
    pruned = invoke("compile-cache", "prune", env={**env, "ENGINE_LOADER_COMPILE_CACHE__KEEP_DAYS": "1e-9"})
    assert pruned.exit_code == 0, pruned.output
    assert list(first.store.list()) == []


def test_an_upload_that_is_not_committed_is_not_seen(first: Machine) -> None:
    with pytest.raises(ZeroDivisionError), first.store.upload(KEY.prefix) as upload:
        upload.write(b"x")
        raise ZeroDivisionError
    assert list(first.store.list()) == []


def test_a_store_that_is_not_signed_is_refused(url: str) -> None:
    with pytest.raises(CacheValidationError, match=r"does not say who else may write to it.*compile_cache\.key_file"):
        ObjectCacheStore(url, Trust())
    ObjectCacheStore(url, Trust(anyone=True))


def test_a_pack_that_was_forged_is_refused(first: Machine, second: Machine) -> None:
    first.save()
    second.trust = Trust(b"another secret, long enough")
    assert second.restore().status != "restored"
    assert second.content() == {}


def test_a_deny_list_is_replaced_and_read(first: Machine, second: Machine, url: str, scratch: Path) -> None:
    first.save()
    (pack,) = first.store.list()
    trust = second.trust
    assert trust.with_denied(second.store, None).denied == DenyList()
    for denied in (DenyList(1, {}), DenyList(2, {pack.digest: "bad"})):
        first.trust.publish_denied(first.store, denied, None)
        on_objects(second, url, scratch)  # as the next process opens it
        second.trust = trust.with_denied(second.store, None)
        assert (second.trust.denied, second.trust.warnings) == (denied, ())
    assert second.restore().status == "refused"
    assert [stored.name for stored in first.store.list()] == [pack.name]


def test_packs_are_signed_again(first: Machine, second: Machine) -> None:
    """In a store that does not replace what is under a name."""
    first.save()
    new, old = HmacKey(b"a new secret of some length"), first.trust.keys[0]
    assert [one.problem for one in resign(first.store, Trust([new, old]))] == [None]
    second.trust = Trust([new])
    assert second.restore().status == "restored"
    assert second.content() == first.content()


def job(action: str, machine: Machine, settings: CompileCacheSettings) -> Job:
    directories = {name: str(path) for name, path in machine.directories.items()}
    return Job(action, "torch", KEY, directories, settings=settings.model_dump(mode="json"))


def test_the_settings_choose_it_by_the_url(first: Machine, second: Machine, url: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"sixteen bytes or more")
    (tmp_path / "key").chmod(0o600)
    settings = CompileCacheSettings(directory=url, key_file=str(tmp_path / "key"), min_local_free_bytes=0)
    assert isinstance(open_store(settings)[0], ObjectCacheStore)
    assert run_job(job("save", first, settings), 60).status == "saved"
    assert run_job(job("restore", second, settings), 60).status == "restored"
    assert second.content() == first.content()


@pytest.mark.parametrize(
    ("status", "code", "message"), [(403, "AccessDenied", "access was denied"), (404, "NoSuchBucket", "no such bucket")]
)
def test_a_server_that_refuses_is_told(
    status: int, code: str, message: str, first: Machine, on_server: FaultServer
) -> None:
    on_server.fault = lambda request: Answer(status=status, code=code)
    settings = CompileCacheSettings(directory="s3://bucket/caches", trust="anyone", min_local_free_bytes=0)
    outcome = perform(job("save", first, settings), settings)
    assert outcome.status == "failed"
    assert message in outcome.messages[0]
    assert "s3://bucket/caches" in outcome.messages[0]


def on_bucket(machine: Machine, scratch: Path) -> Machine:
    return on_objects(machine, "s3://bucket/caches", scratch)


def test_a_server_that_ignores_conditions_still_has_one_pack_of_equal_content(
    first: Machine, second: Machine, on_server: FaultServer, scratch: Path
) -> None:
    """Its PUT replaces whatever the condition says, and its DELETE and COPY too."""
    for machine in (on_bucket(first, scratch), on_bucket(second, scratch)):
        machine.write("inductor/ab/kernel.so", b"equal")
    (first.directories["triton"] / TRITON_KERNEL.removeprefix("triton/")).unlink()
    first.save()
    before = {name: content for name, content in on_server.objects.items() if name.endswith(".tar.zst")}
    with second.store.upload(KEY.prefix) as upload:
        upload.write(b"other bytes")
        upload.commit(next(iter(before)).removeprefix("bucket/caches/"))
    assert {name: content for name, content in on_server.objects.items() if name.endswith(".tar.zst")} == before
    assert second.save().status == "complete"


def test_a_pack_that_was_replaced_since_it_was_listed_is_noticed(
    first: Machine, on_server: FaultServer, scratch: Path
) -> None:
    on_bucket(first, scratch).save()
    (stored,) = first.store.list()
    with first.store.open(stored.name) as pack:
        on_server.objects[f"bucket/caches/{stored.name}"] = b"x" * stored.size
        with pytest.raises(FileNotFoundError, match="list again"):
            pack.read(0, 10)


def test_one_pod_has_a_lease_until_it_runs_out(
    first: Machine, second: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first.store.found()
    lease = acquire(first.store, KEY.prefix, "save", 60)
    assert lease is not None
    assert acquire(second.store, KEY.prefix, "save", 60) is None
    real = second.store.now()
    monkeypatch.setattr(second.store, "now", lambda: real + 61)
    taken = acquire(second.store, KEY.prefix, "save", 60)
    assert taken is not None
    lease.release()
    assert acquire(first.store, KEY.prefix, "save", 60) is None
    taken.release()
    assert acquire(first.store, KEY.prefix, "save", 60) is not None


def test_a_prefix_that_is_not_empty_is_refused_until_it_is_adopted(
    first: Machine, second: Machine, url: str, on_s3: S3Server
) -> None:
    foreign = f"{url.removeprefix('s3://caches/')}/backups/2025/db.tar.zst"
    on_s3.put("caches", {foreign: b"somebody's"})
    with pytest.raises(CacheValidationError, match="compile-cache adopt"):
        first.save()
    assert "adopt" in second.restore().messages[0]
    adopt(first.store)
    first.save()
    assert second.restore().status == "restored"
    done = prune(first.store, Policy(1e-9, 1, 1, 0), SECRET, now=first.store.now() + 40 * 86400)
    assert [name.rpartition("/")[0] for name, _, _ in done.deleted] == [KEY.prefix]
    assert first.store.read("backups/2025/db.tar.zst", 100).content == b"somebody's"
    assert [entry.name for entry in first.store.entries()] == ["engine-loader-store.json"]


def test_use_is_noted_and_keeps_a_key(first: Machine, second: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    first.save()
    (pack,) = first.store.list()
    second.restore()
    note_used(second.store, KEY.prefix)
    plain = first.store.entries

    def aged(prefix: str = "") -> list[Stored]:
        """As if the pack had been uploaded 40 days ago."""
        return [
            replace(entry, modified=entry.modified - 40 * 86400) if entry.kind == "pack" else entry
            for entry in plain(prefix)
        ]

    monkeypatch.setattr(first.store, "entries", aged)
    policy = Policy(30, 10, 1 << 40, 0)
    assert prune(first.store, policy, SECRET, now=first.store.now()).deleted == []
    for entry in plain(KEY.prefix):
        if entry.kind == "used":
            first.store.delete(entry.name)
    assert [name for name, _, _ in prune(first.store, policy, SECRET, now=first.store.now()).deleted] == [pack.name]


def test_a_store_whose_clock_is_another_is_not_pruned(first: Machine, on_server: FaultServer, scratch: Path) -> None:
    """This server's is in 2024."""
    on_bucket(first, scratch).save()
    done = prune(first.store, Policy(1e-9, 1, 1, 0), SECRET)
    assert done.deleted == []
    assert "clock" in done.messages[0]


def test_neighbouring_frames_come_with_one_request(first: Machine, on_server: FaultServer, scratch: Path) -> None:
    for number in range(6):
        on_bucket(first, scratch).write(f"inductor/{number}", some_bytes(5 << 20, number))
    first.save()
    fresh = on_bucket(Machine(first.directories["inductor"].parent / "fresh", scratch), scratch)
    on_server.requests.clear()
    assert fresh.restore().status == "restored"
    assert fresh.content() == first.content()
    assert len(on_server.requests) == 4  # marker, listing, index, and all frames of the pack
