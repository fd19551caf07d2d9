"""Local caches as pods have them: volumes that others may write, links to other disks, engines that share a node."""

import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_loader.compile_cache.directories import directories_of, name_private_directories
from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.process.job import Job
from engine_loader.compile_cache.process.operations import perform
from engine_loader.compile_cache.process.outcome import Outcome
from engine_loader.compile_cache.process.trials import engine_lock
from engine_loader.compile_cache.process.use import note_use
from engine_loader.settings import CompileCacheSettings
from tests.compile_cache.test_stores import settings_for

PARTS = (("vllm", "0.32"), ("gpu", "none"))
KEY, OTHER = CacheKey(PARTS, "llama_tp1"), CacheKey(PARTS, "qwen_tp1")
GRAPH = "torch_compile_cache/{}/rank_0_0/backbone/artifact"
ONLY_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


class Engine:
    """vLLM on a node, as its hooks see it: a restore, what it compiles and notes, and a save."""

    def __init__(self, cache: Path, settings: CompileCacheSettings, key: CacheKey = KEY, model: str = "h1") -> None:
        self.cache, self.settings, self.key, self.model = cache, settings, key, model
        self.since_ns = time.time_ns()

    def job(self, action: str) -> Job:
        return Job(action, "vllm", self.key, {"vllm": str(self.cache)}, since_ns=self.since_ns)  # type: ignore[arg-type]

    def restore(self) -> Outcome:
        return perform(self.job("restore"), self.settings)

    def compile(self, factor: str = "same") -> None:
        """Compile what is not there, and note it."""
        file = self.cache / GRAPH.format(self.model)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.model.encode() * 100 + os.urandom(8))
        directory = str(self.cache / "torch_compile_cache" / self.model)
        factors = {"model": self.model, "env": {"FACTOR": factor}}
        note_use(self.cache, "rank_0_0", [directory], factors, engine=self.since_ns, scope=self.key.scope)

    def save(self) -> Outcome:
        return perform(self.job("save"), self.settings)

    def start(self) -> tuple[Outcome, Outcome]:
        restored = self.restore()
        self.compile()
        return restored, self.save()


@pytest.fixture
def settings(tmp_path: Path) -> CompileCacheSettings:
    return settings_for(tmp_path / "store")


@pytest.fixture(params=[0o777, 0o2775], ids=["emptyDir", "fsGroup"])
def volume(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A volume's root in the place of vLLM's cache."""
    place = tmp_path / "volume"
    place.mkdir()
    place.chmod(request.param)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(place))
    return place


def packs(settings: CompileCacheSettings) -> int:
    return len(list(Path(settings.directory).rglob("*.tar.zst")))


class TestAVolumeThatOthersMayWrite:
    def test_the_engine_gets_a_directory_of_its_own_below_it(
        self, volume: Path, settings: CompileCacheSettings, tmp_path: Path
    ) -> None:
        (line,) = name_private_directories("vllm", lambda: True)
        own = volume / f"private-{os.geteuid()}"
        assert os.environ["VLLM_CACHE_ROOT"] == str(own)
        assert line.startswith(f"others may write {volume}, so VLLM_CACHE_ROOT is now {own}")
        assert stat.S_IMODE(own.stat().st_mode) & 0o777 == 0o700
        assert name_private_directories("vllm", lambda: True) == []  # in the processes that the engine starts
        assert directories_of("vllm")["vllm"] == own
        Engine(tmp_path / "elsewhere", settings).start()
        restored, saved = Engine(own, settings).start()
        assert (restored.status, restored.files, restored.messages) == ("restored", 1, [])
        assert (saved.verdict, saved.status) == ("hit", "complete")

    def test_commands_find_it_where_the_variable_names_the_volume(self, volume: Path) -> None:
        name_private_directories("vllm", lambda: True)
        named = {"VLLM_CACHE_ROOT": str(volume)}
        assert directories_of("vllm", named)["vllm"] == volume / f"private-{os.geteuid()}"

    def test_a_directory_that_another_made_there_is_not_taken(self, volume: Path, tmp_path: Path) -> None:
        """Neither a link nor one that is open."""
        own = volume / f"private-{os.geteuid()}"
        (tmp_path / "theirs").mkdir(mode=0o700)
        own.symlink_to(tmp_path / "theirs")
        assert name_private_directories("vllm", lambda: True) == []
        own.unlink()
        own.mkdir()
        own.chmod(0o777)
        assert name_private_directories("vllm", lambda: True) == []
        assert os.environ["VLLM_CACHE_ROOT"] == str(volume)

    def test_none_is_made_where_anyone_is_trusted_or_nothing_is_restored(self, volume: Path) -> None:
        assert name_private_directories("vllm", lambda: False) == []
        assert list(volume.iterdir()) == []

    def test_a_refused_restore_is_told_by_the_verdict_and_saves_no_pack_at_each_start(
        self, volume: Path, settings: CompileCacheSettings, tmp_path: Path
    ) -> None:
        Engine(tmp_path / "elsewhere", settings).start()
        assert packs(settings) == 1
        for _ in range(3):  # each pod has a new volume
            shutil.rmtree(volume / "torch_compile_cache", ignore_errors=True)
            restored, saved = Engine(volume, settings).start()
            assert restored.status == "refused"
            assert f"name a directory below it (VLLM_CACHE_ROOT={volume}/private)" in restored.messages[0]
            assert "key_file" not in restored.messages[0]
            assert saved.verdict == "refused"
            assert saved.reasons[0].startswith("the restore was refused: the cache vllm is left alone")
            assert f"name a directory below it (VLLM_CACHE_ROOT={volume}/private)" in saved.messages[-1]
            assert packs(settings) == 1
        # What the message says works.
        restored, saved = Engine(volume / "private", settings).start()
        assert (restored.files, saved.verdict) == (1, "hit")

    def test_trust_in_anyone_is_honoured(self, volume: Path, tmp_path: Path) -> None:
        settings = settings_for(tmp_path / "store", trust="anyone")
        _, saved = Engine(volume, settings).start()
        assert (saved.status, saved.files) == ("saved", 1)
        (other := tmp_path / "other").mkdir()
        other.chmod(0o777)
        restored, saved = Engine(other, settings).start()
        assert (restored.files, saved.verdict) == (1, "hit")

    def test_modes_below_a_directory_that_nobody_else_can_enter_do_not_count(
        self, volume: Path, settings: CompileCacheSettings
    ) -> None:
        """An engine with umask 0."""
        own = volume / "own"
        own.mkdir(mode=0o700)
        before = os.umask(0)
        try:
            _, saved = Engine(own, settings).start()
        finally:
            os.umask(before)
        assert stat.S_IMODE((own / "torch_compile_cache").stat().st_mode) & 0o777 == 0o777
        assert (saved.status, saved.files) == ("saved", 1)
        own.chmod(0o711)
        assert "others may write it" in Engine(own, settings).start()[1].messages[0]


class TestTwoEnginesOfOneNode:
    @pytest.fixture
    def cache(self, tmp_path: Path) -> Path:
        return tmp_path / "node" / "vllm"

    def saved_files(self, settings: CompileCacheSettings, key: CacheKey, place: Path) -> set[str]:
        """What a new node gets of a key."""
        perform(Job("restore", "vllm", key, {"vllm": str(place)}), settings)
        return {
            str(path.relative_to(place))
            for path in place.rglob("*")
            if path.is_file() and "engine_loader" not in str(path)
        }

    def test_each_has_the_verdict_of_its_own_notes(
        self, cache: Path, settings: CompileCacheSettings, tmp_path: Path
    ) -> None:
        first, second = Engine(cache, settings), Engine(cache, settings, OTHER, "h2")
        for engine in (first, second):
            engine.start()
        node = tmp_path / "next" / "vllm"
        first, second = Engine(node, settings), Engine(node, settings, OTHER, "h2")
        first.restore()
        second.restore()
        first.compile()
        second.compile(factor="changed")  # noted under the same name of a rank, and before the other's save
        assert (first.save().verdict, second.save().verdict) == ("hit", "hit")

    def test_files_that_one_noted_are_not_saved_with_the_other(
        self, cache: Path, settings: CompileCacheSettings, tmp_path: Path
    ) -> None:
        first, second = Engine(cache, settings), Engine(cache, settings, OTHER, "h2")
        for engine in (first, second):
            engine.restore()
            engine.compile()
        first.save()
        second.save()
        assert self.saved_files(settings, KEY, tmp_path / "one") == {GRAPH.format("h1")}
        assert self.saved_files(settings, OTHER, tmp_path / "two") == {GRAPH.format("h2")}

    def test_a_model_that_still_compiles_is_not_saved_with_another(
        self, cache: Path, settings: CompileCacheSettings, tmp_path: Path
    ) -> None:
        first, second = Engine(cache, settings), Engine(cache, settings, OTHER, "h2")
        first.restore()
        lock = engine_lock(cache, second.since_ns)
        assert lock.acquire(0)
        first.compile()
        half = cache / GRAPH.format("h2")
        half.parent.mkdir(parents=True)
        half.write_bytes(b"half of it")
        first.save()
        lock.release()
        assert self.saved_files(settings, KEY, tmp_path / "one") == {GRAPH.format("h1")}

    def test_a_worker_that_knows_no_engine_notes_for_its_scope(
        self, cache: Path, settings: CompileCacheSettings
    ) -> None:
        first = Engine(cache, settings)
        first.start()
        again = Engine(cache, settings)
        again.restore()
        note_use(cache, "rank_0_0", [], {"model": "h2"}, scope=OTHER.scope)
        assert again.save().verdict == ""  # no rank of this engine ran
        note_use(cache, "rank_0_0", [], {"model": "h1"}, scope=KEY.scope)
        assert again.save().verdict == "hit"


class TestALinkInACache:
    @pytest.fixture(params=["same", "other"])
    def scratch(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
        """A directory of this file system, or of another one."""
        if request.param == "same":
            (tmp_path / "scratch").mkdir(mode=0o700)
            yield tmp_path / "scratch"
            return
        shm = Path("/dev/shm")
        if not os.access(shm, os.W_OK) or shm.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is no second file system")
        place = shm / f"engine-loader-test-{os.getpid()}"
        place.mkdir(mode=0o700)
        yield place
        for path in sorted(place.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        place.rmdir()

    @pytest.fixture
    def linked(self, scratch: Path, tmp_path: Path) -> Path:
        """A cache whose largest part lies elsewhere."""
        cache = tmp_path / "linked"
        cache.mkdir(mode=0o700)
        (cache / "torch_compile_cache").symlink_to(scratch)
        return cache

    def test_what_lies_behind_it_is_saved_and_restored(
        self, linked: Path, scratch: Path, settings: CompileCacheSettings, tmp_path: Path
    ) -> None:
        (scratch / "round").symlink_to(scratch)  # leads to itself
        _, saved = Engine(linked, settings).start()
        assert (saved.status, saved.files) == ("saved", 1)
        file = scratch / "h1" / "rank_0_0" / "backbone" / "artifact"
        content, when = file.read_bytes(), file.stat().st_mtime_ns
        file.unlink()
        restored, saved = Engine(linked, settings).start()
        assert (restored.status, restored.files, restored.messages) == ("restored", 1, [])
        assert (file.read_bytes(), file.stat().st_mtime_ns) == (content, when)
        assert saved.verdict == "hit"
        assert [path.name for path in scratch.rglob("*.tmp*")] == []
        restored, _ = Engine(tmp_path / "plain", settings).start()
        assert restored.files == 1

    def test_a_link_to_what_others_may_write_is_not_followed(
        self, linked: Path, scratch: Path, settings: CompileCacheSettings, tmp_path: Path
    ) -> None:
        Engine(tmp_path / "plain", settings).start()
        scratch.chmod(0o777)
        restored, saved = Engine(linked, settings).start()
        assert (restored.status, restored.files) == ("refused", 0)
        assert f"{linked}/torch_compile_cache: is left alone: others may write it" in restored.messages[0]
        assert f"{linked}/torch_compile_cache: others may write it" in saved.messages[-1]
        assert saved.verdict == "refused"

    @ONLY_ROOT
    def test_a_link_of_another_user_is_not_followed(
        self, linked: Path, scratch: Path, settings: CompileCacheSettings, tmp_path: Path
    ) -> None:
        Engine(tmp_path / "plain", settings).start()
        os.lchown(linked / "torch_compile_cache", 12345, 12345)
        restored = Engine(linked, settings).restore()
        assert (restored.status, restored.files) == ("refused", 0)
        assert list(scratch.iterdir()) == []
