"""The compile cache with its store in a bucket."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from engine_loader.compile_cache.cache_errors import CacheValidationError
from engine_loader.compile_cache.compaction import compact
from engine_loader.compile_cache.packs.resign import resign
from engine_loader.compile_cache.process.job import Job
from engine_loader.compile_cache.process.operations import perform
from engine_loader.compile_cache.process.session import run_job
from engine_loader.compile_cache.retention import Policy, prune
from engine_loader.compile_cache.stores import objects as object_store
from engine_loader.compile_cache.stores.objects import ObjectCacheStore
from engine_loader.compile_cache.stores.opening import open_store
from engine_loader.compile_cache.trust import Trust
from engine_loader.compile_cache.trust.denied import DenyList
from engine_loader.compile_cache.trust.signatures import HmacKey
from engine_loader.settings import CompileCacheSettings
from tests.cli.running import invoke
from tests.compile_cache.support import KEY, OTHER_KEY, SECRET, Machine, some_bytes
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
    machine.write("triton/XYZ/kernel.cubin", bytes(range(256)))
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
    prune(first.store, Policy(1e-9, 1, 1, 0), SECRET)
    assert list(first.store.list()) == []


def test_a_name_that_exists_stays_as_it_is(first: Machine, tmp_path: Path) -> None:
    path = tmp_path / "pack"
    name = f"{KEY.prefix}/abc.tar.zst"
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
    on_server.fault = lambda request: refusal if "if-none-match" in request.headers else None
    store = ObjectCacheStore("s3://bucket/caches", SECRET, str(tmp_path))
    with store.upload(KEY.prefix) as upload:
        upload.write(b"content")
        upload.commit(f"{KEY.prefix}/abc.tar.zst")
    stays = refusal is not None and refusal.status == 412
    assert on_server.objects == ({} if stays else {f"bucket/caches/{KEY.prefix}/abc.tar.zst": b"content"})


def test_a_large_pack_goes_up_in_parts(first: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "_WHOLE_BYTES", 1 << 20)
    content, name = some_bytes(6 << 20), f"{KEY.prefix}/abc.tar.zst"
    with first.store.upload(KEY.prefix) as upload:
        upload.write(content)
        upload.commit(name)
    with first.store.open(name) as pack:
        assert pack.read(1000, pack.size - 1000) == content[1000:]


def test_the_command_lists_and_prunes_it(first: Machine, url: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"sixteen bytes or more")
    (tmp_path / "key").chmod(0o600)
    first.save()
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


def test_a_deny_list_is_replaced_and_read(first: Machine, second: Machine) -> None:
    first.save()
    (pack,) = first.store.list()
    trust = second.trust
    assert trust.with_denied(second.store, None).denied == DenyList()
    for denied in (DenyList(1, {}), DenyList(2, {pack.digest: "bad"})):
        first.trust.publish_denied(first.store, denied, None)
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
