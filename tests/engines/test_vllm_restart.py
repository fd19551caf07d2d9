"""The real `vllm serve` with compilation: cold, then on fresh machines that have nothing but the store."""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine_loader.compile_cache.process.job import Job
from engine_loader.compile_cache.process.operations import perform
from engine_loader.compile_cache.verdict.explain import last_key
from engine_loader.report.reading.account import Account, account_of
from engine_loader.report.reading.cache_use import restore_status
from engine_loader.report.reading.comparison import compare
from engine_loader.report.starts import find_start
from engine_loader.settings import CompileCacheSettings
from tests.support.moto_server import MotoServer
from tests.support.tiny_models import make_model
from tests.support.vllm_server import VllmServer

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(2400)]

START_TIMEOUT_S = 700.0  # compiling on a busy machine takes minutes
PROMPT = "Once upon a time"
DONE = ("compile cache: saved", "compile cache: nothing new to save", "nothing was saved")
NO_COMPILATION = ("Directly load AOT compilation from path",)
COMPILATION = ("saved AOT compiled function to", "Compiling model again")


@dataclass
class Start:
    """What one start of a server on a fresh machine was like; ``files`` are what its caches hold, with their mtimes."""

    text: str
    log: str
    files: dict[str, int]
    seconds_to_ready: float
    account: Account
    metrics: str

    @property
    def init_s(self) -> float:
        (seconds,) = re.findall(r"init engine .* took ([\d.]+) s", self.log)
        return float(seconds)

    @property
    def restored(self) -> int:
        return sum(map(int, re.findall(r"compile cache: restored (\d+) files", self.log)))


class Fleet:
    """Machines that share a model and a store, and nothing else."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.model = make_model("llama", directory / "llama", shards=2)
        self.machines = 0
        self.log = directory / "none"

    @property
    def last_log(self) -> str:
        """All that the last server printed, also of one that never served."""
        return self.log.read_text(errors="replace")

    def start(
        self,
        *args: str,
        eager: bool = False,
        directory: Path | None = None,
        again: int | None = None,
        **variables: str,
    ) -> Start:
        """Serve on a machine without any cache until the compile cache has told that it is done.

        ``directory``: of another store. ``again``: on the machine of that number, with the caches that are there.
        """
        self.machines += again is None
        machine = self.directory / f"machine-{again or self.machines}"
        for name in ("home", "tmp"):
            (machine / name).mkdir(parents=True, exist_ok=again is not None)
        env = {
            "HOME": str(machine / "home"),
            "TMPDIR": str(machine / "tmp"),
            "VLLM_CACHE_ROOT": str(machine / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": None,
            "TRITON_CACHE_DIR": None,
            "ENGINE_LOADER_COMPILE_CACHE__ENABLED": "true",
            "ENGINE_LOADER_COMPILE_CACHE__DIRECTORY": str(directory or self.store),
            **variables,
        }
        self.log = machine / "log"
        with VllmServer(
            self.model, *args, env=env, eager=eager, start_timeout_s=START_TIMEOUT_S, log_path=self.log
        ) as server:
            text = server.complete(PROMPT, max_tokens=12)
            with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as response:
                metrics = response.read().decode()
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and not any(words in server.log for words in DONE):
                time.sleep(0.2)
        files = {
            str(path.relative_to(machine)): path.stat().st_mtime_ns
            for directory in ("vllm", "tmp", "home")
            for path in (machine / directory).rglob("*")
            if path.is_file() and "/.engine_loader/" not in str(path) and "/locks/" not in str(path)
        }
        compiled = {
            file: mtime for file, mtime in files.items() if re.match("vllm/|tmp/torchinductor|home/.triton", file)
        }
        assert server.seconds_to_ready is not None
        account = account_of(find_start("latest", machine / "home" / ".cache" / "engine_loader" / "starts"))
        return Start(text, server.log, compiled, server.seconds_to_ready, account, metrics)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def cold(fleet: Fleet) -> Start:
    return fleet.start("--load-format", "b10_3fs")


@pytest.fixture(scope="module")
def restored(fleet: Fleet, cold: Start) -> Start:
    return fleet.start("--load-format", "b10_3fs")


def test_the_first_start_compiles_and_saves(cold: Start) -> None:
    assert "has nothing yet" in cold.log
    assert "compile cache: miss; the store had nothing" in cold.log
    assert "compile cache: saved" in cold.log
    assert COMPILATION[0] in cold.log


def test_a_start_on_the_restored_cache_compiles_nothing(cold: Start, restored: Start) -> None:
    assert restored.text == cold.text
    assert restored.restored > 0
    assert all(words in restored.log for words in NO_COMPILATION)
    assert not any(words in restored.log for words in COMPILATION)
    assert restored.files == cold.files  # nothing was added, nothing is missing, nothing was written again
    assert "compile cache: hit" in restored.log
    assert "compile cache: nothing new to save" in restored.log
    # A worker with several CPUs is spawned; but nothing that the cache does may keep one from being forked.
    assert "what was imported may have read" not in cold.log + restored.log


def test_a_restored_start_needs_no_process_to_inspect_the_model(restored: Start) -> None:
    assert "restored vLLM's description of the model" in restored.log


def test_a_restored_start_leaves_what_its_restores_read_for_the_next_one(fleet: Fleet, restored: Start) -> None:
    """Of both: that of the model's description, in the first process, and the engine's."""
    starts = fleet.directory / "machine-2" / "home" / ".cache" / "engine_loader" / "starts"
    (path,) = starts.glob("restored-vllm-*.json")
    read = {str(Path(name).relative_to(fleet.store)): ranges for name, ranges in json.loads(path.read_text()).items()}
    assert next(iter(read)) == "engine-loader-store.json"
    scopes = {name.split("/")[1] for name, ranges in read.items() if name.endswith("/index") and ranges}
    assert len(scopes) == 2
    assert "model-infos" in scopes
    assert any(name.endswith(".tar.zst") and ranges for name, ranges in read.items())


def test_a_restored_start_is_several_times_faster(cold: Start, restored: Start) -> None:
    """The figures are in docs/performance.md; here is only what holds on a busy machine."""
    print(f"engine initialisation {cold.init_s:.1f} -> {restored.init_s:.1f} s ({restored.init_s / cold.init_s:.2f})")
    print(f"ready after {cold.seconds_to_ready:.1f} -> {restored.seconds_to_ready:.1f} s")
    assert restored.init_s < cold.init_s / 2


@pytest.mark.parametrize("which", ["cold", "restored"])
def test_the_report_knows_where_the_time_of_a_start_went(which: str, request: pytest.FixtureRequest) -> None:
    start: Start = request.getfixturevalue(which)
    timeline = start.account.timeline
    assert timeline.ready is not None
    assert abs(timeline.ready - start.seconds_to_ready) < 2  # what the test saw from outside, by asking now and then
    assert start.account.coverage > 0.95
    assert [process.role for process in timeline.processes if process.rank == 0] == ["worker"]
    (load,) = [phase.details for _, phase in timeline.phases("weight reading")]
    assert (load["tensors"], load["files"], load["source"]) == (21, 2, "posix")
    (told,) = re.findall(r"^engine_loader_start_seconds (\S+)$", start.metrics, flags=re.MULTILINE)
    assert float(told) == pytest.approx(timeline.ready, abs=0.001)
    said = "ready in [0-9.]+ s; `engine-loader report` says where the time went"
    assert len(re.findall(said, start.log)) == 1
    print(f"{which}: {timeline.ready:.1f} s, {start.account.coverage:.1%} in known phases")


def test_the_report_tells_a_cold_start_from_a_restored_one(cold: Start, restored: Start) -> None:
    assert (restore_status(cold.account.timeline), restore_status(restored.account.timeline)) == ("nothing", "restored")
    changes = {change.phase: change for change in compare(cold.account.path, restored.account.path).phases}
    assert changes["compile"].after < changes["compile"].before / 2
    assert "compile" in cold.account.advice[0].text or any("compile" in one.text for one in cold.account.advice)


def test_without_the_fix_up_the_kernels_still_come_from_the_cache(fleet: Fleet, cold: Start, restored: Start) -> None:
    start = fleet.start("--load-format", "b10_3fs", ENGINE_LOADER_COMPILE_CACHE__FIXUPS="false")
    assert start.text == cold.text
    assert "Compiling model again due to a load failure" in start.log
    assert "compile cache: partial" in start.log or "compile cache: hit" in start.log
    print(f"engine initialisation without the fix-up {start.init_s:.1f} s ({start.init_s / cold.init_s:.2f} of cold)")


def test_a_machine_shares_what_it_has_through_an_object_store(fleet: Fleet, cold: Start) -> None:
    """The first machine's caches are warm: it starts with another store, which has nothing yet."""
    (fleet.directory / "key").write_text("a secret of the fleet, not of the bucket's owner")
    (fleet.directory / "key").chmod(0o600)
    with MotoServer() as moto:
        moto.make_bucket("caches")
        store = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_ENDPOINT_URL": moto.url,
            "ENGINE_LOADER_COMPILE_CACHE__DIRECTORY": "s3://caches/fleet",
            "ENGINE_LOADER_COMPILE_CACHE__KEY_FILE": str(fleet.directory / "key"),
        }
        saving = fleet.start("--load-format", "b10_3fs", again=1, **store)
        restoring = fleet.start("--load-format", "b10_3fs", **store)
    assert "compile cache: saved" in saving.log
    assert saving.text == restoring.text == cold.text
    assert restoring.restored > 0
    assert all(words in restoring.log for words in NO_COMPILATION)
    assert not any(words in restoring.log for words in COMPILATION)
    assert compiled(restoring) == compiled(saving)
    assert "compile cache: hit" in restoring.log
    assert "compile cache: nothing new to save" in restoring.log


def compiled(start: Start) -> dict[str, int]:
    """Without what is not shared by a warm machine: inductor's precompiled headers never are, vLLM's account of its key
    goes into manifests, and the description of a model is shared by the machine that had to make it."""
    own = ("/precompiled_headers/", "/modelinfos/", "/cache_key_factors.json")
    return {file: mtime for file, mtime in start.files.items() if not any(part in file for part in own)}


@pytest.fixture
def small_file_system(fleet: Fleet, cold: Start) -> Iterator[Path]:
    """A file system with a copy of the store and room for little else."""
    place = fleet.directory / "small"
    place.mkdir(exist_ok=True)
    nbytes = sum(path.stat().st_size + 4096 for path in fleet.store.rglob("*"))
    options = f"size={nbytes + (256 << 10)},mode=0700"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    shutil.copytree(fleet.store, place / "store")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def warning(start: Start, words: str) -> str:
    """The first line with these words, which is a warning."""
    line = next(line for line in start.log.splitlines() if words in line)
    assert "WARNING" in line
    return line


def test_a_store_that_cannot_be_used_does_not_keep_the_engine_from_starting(fleet: Fleet, cold: Start) -> None:
    """With any load format but ours, which refuses such a setting at once (vllm/test_early_errors.py)."""
    (fleet.directory / "a-file").write_text("no directory")
    start = fleet.start(eager=True, directory=fleet.directory / "a-file" / "store")
    assert start.text
    assert warning(start, "a-file is a file, not a directory: name another directory there")


def test_a_miss_is_explained_another_load_format_is_served_and_a_full_store_keeps_no_engine_from_starting(
    fleet: Fleet, cold: Start, restored: Start, small_file_system: Path
) -> None:
    """One start for all of it: it compiles, and takes long."""
    start = fleet.start(
        directory=small_file_system / "store",
        VLLM_NIXL_SIDE_CHANNEL_PORT="5601",
        ENGINE_LOADER_COMPILE_CACHE__MIN_STORE_FREE_BYTES="0",
    )
    assert start.text == cold.text
    assert "compile cache: miss" in start.log
    assert "VLLM_NIXL_SIDE_CHANNEL_PORT was 5600 when this cache was made, is 5601 now" in start.log
    assert str(small_file_system) in warning(start, "room")
    assert list(small_file_system.rglob(".unfinished-*")) == []


def test_an_engine_starts_though_its_store_vanishes_while_it_is_read(fleet: Fleet, cold: Start) -> None:
    store = fleet.directory / "vanishing"
    shutil.copytree(fleet.store, store)
    with ThreadPoolExecutor(1) as threads:
        starting = threads.submit(fleet.start, eager=True, directory=store)
        machine = fleet.directory / f"machine-{fleet.machines + 1}"
        while not any(machine.glob("*/.engine_loader")) and not starting.done():
            time.sleep(0.001)
        shutil.rmtree(store)
        start = starting.result()
    assert start.text
    # What was opened in time can still be read; the rest is told of.
    assert "compile cache: restored" in start.log or "compile cache" in warning(start, "vanishing")


def test_an_engine_starts_though_its_store_hangs(fleet: Fleet, cold: Start) -> None:
    pipe = fleet.directory / "pipe"
    os.mkfifo(pipe, 0o600)  # nobody writes to it: who opens it waits in the kernel
    start = fleet.start(
        eager=True,
        ENGINE_LOADER_COMPILE_CACHE__KEY_FILE=str(pipe),
        ENGINE_LOADER_COMPILE_CACHE__RESTORE_TIMEOUT_S="3",
        ENGINE_LOADER_COMPILE_CACHE__SAVE_TIMEOUT_S="3",
    )
    assert start.text
    assert "restore_timeout_s" in start.log


@pytest.fixture
def poisoned(fleet: Fleet, cold: Start, tmp_path: Path) -> Path:
    """A store whose packs are sound and validly made, and whose libraries end the process that loads them."""
    caches = tmp_path / "vllm"
    shutil.copytree(fleet.directory / "machine-1" / "vllm", caches, ignore=shutil.ignore_patterns(".engine_loader"))
    (tmp_path / "poison.c").write_text("__attribute__((constructor)) static void end(void) { __builtin_trap(); }")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "poison.so", "poison.c"], cwd=tmp_path, check=True)
    # Kernels alone: where a library by which inductor tries the CPU fails, it generates other code.
    libraries = list(caches.rglob("*.main.so"))
    assert libraries
    for library in libraries:
        library.chmod(0o700)
        shutil.copyfile(tmp_path / "poison.so", library)
    key = last_key(fleet.directory / "machine-1" / "vllm")
    assert key is not None
    settings = CompileCacheSettings(directory=str(tmp_path / "store"), min_store_free_bytes=0)
    saved = perform(Job("save", "vllm", key, {"vllm": str(caches)}), settings)
    assert saved.status == "saved", saved
    return tmp_path / "store"


def test_a_restored_start_that_crashes_once_is_followed_by_one_that_serves(
    fleet: Fleet, cold: Start, poisoned: Path
) -> None:
    with pytest.raises(RuntimeError, match="before it was ready") as crash:
        fleet.start("--load-format", "b10_3fs", directory=poisoned)
    assert "compile cache: restored" in fleet.last_log, crash.value
    store = {path.name for path in poisoned.rglob("*.tar.zst")}
    start = fleet.start("--load-format", "b10_3fs", directory=poisoned, again=fleet.machines)
    assert start.text == cold.text
    assert start.restored == 0
    (digest,) = (path.name.removeprefix("suspect-") for path in poisoned.rglob("suspect-*"))
    assert f"{digest}.tar.zst" in store  # what a crashed engine leaves is not saved
    line = warning(start, "the last engine here ended before it was ready")
    assert digest in line
    assert "compile cache: saved" in start.log  # what it compiled takes the place of the poison
