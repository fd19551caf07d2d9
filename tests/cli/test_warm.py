"""``engine-loader warm`` as a person sees it."""

import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from engine_loader.compile_cache.host.versions import module_version
from engine_loader.start.opened_files import list_name, write_list
from tests.cli.running import run
from tests.compile_cache.support import Machine, some_bytes
from tests.support.checkpoints import checkpoint, entry
from tests.support.page_cache import drop, made_cold, share_of

Warm = Callable[..., CompletedProcess[str]]


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A model's directory with a file that is not in the page cache."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(checkpoint({"a": entry("U8", [3 << 20])}))
    made_cold(path)
    return tmp_path


@pytest.fixture
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for a compile cache's store, where nothing is yet; not that of whoever runs the tests."""
    return tmp_path_factory.mktemp("cache") / "store"


@pytest.fixture
def warm(store: Path) -> Warm:
    """The command for a model, with more settings by keyword."""

    def warm(model: str | Path, **env: str | Path) -> CompletedProcess[str]:
        found = {"COMPILE_CACHE__DIRECTORY": store} | env
        return run("warm", model, env={f"ENGINE_LOADER_{name}": str(value) for name, value in found.items()})

    return warm


def test_a_cold_model_is_read_into_the_page_cache(cold: Path, warm: Warm) -> None:
    first = warm(cold)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(f"{cold}: 3.00 MiB into the page cache in ")
    assert "were there already" not in first.stdout
    assert "MiB were there already" in warm(cold).stdout


@pytest.mark.parametrize(
    ("model", "env", "said"),
    [
        ("s3://bucket/model", {}, "the weights are left alone: they lie in an object store"),
        ("/missing/model", {}, "No such file or directory"),
        (".", {"LOADER__READ_MODE": "direct"}, "read past the page cache (loader.read_mode: direct)"),
    ],
)
def test_what_cannot_be_warmed_is_an_error_with_its_reason(
    model: str, env: dict[str, str], said: str, warm: Warm
) -> None:
    done = warm(model, **env)
    assert done.returncode == 1
    assert said in " ".join(done.stderr.split())


def test_a_bad_setting_is_told(tmp_path: Path, warm: Warm) -> None:
    done = warm(tmp_path, START__WARM="always")
    assert done.returncode == 2
    assert "ENGINE_LOADER_START__WARM" in done.stderr


@pytest.mark.engine
def test_what_the_last_start_opened_is_read_before_the_weights(
    cold: Path, tmp_path_factory: pytest.TempPathFactory, warm: Warm
) -> None:
    place = tmp_path_factory.mktemp("opened")
    files = [place / "a.so", place / "b.pyc"]
    for path in files:
        path.write_bytes(bytes(1 << 20))
        drop(path)
    os.mkfifo(place / "pipe.so")
    listed = [*map(str, files), str(place / "missing.pyc"), str(place / "pipe.so")]
    write_list(place / list_name("vllm", module_version("vllm")), listed)
    opened, weights = warm(cold, REPORT__DIRECTORY=place).stdout.splitlines()
    assert opened.startswith("2 .so and .pyc files of the last start: 2.00 MiB into the page cache in ")
    assert weights.startswith(f"{cold}: 3.00 MiB into the page cache in ")
    assert min(map(share_of, files)) > 0.9
    alone = warm("s3://bucket/model", REPORT__DIRECTORY=place)
    assert alone.returncode == 1
    assert alone.stdout.startswith("2 .so and .pyc files of the last start: ")
    assert "they lie in an object store" in " ".join(alone.stderr.split())


def test_the_compile_cache_has_a_line_of_its_own_between_what_is_opened_and_the_weights(
    cold: Path, store: Path, tmp_path_factory: pytest.TempPathFactory, warm: Warm
) -> None:
    machine = Machine(tmp_path_factory.mktemp("machine"), store)
    machine.write("inductor/ab/kernel.so", some_bytes(2 << 20))
    machine.save()
    index = machine.packs()[0].with_name("index")
    made_cold(index, *machine.packs())
    cache, weights = warm(cold).stdout.splitlines()
    assert cache.startswith("compile cache: 2 files, ")
    assert cache.partition(" into the page cache in ")[1]
    assert weights.startswith(f"{cold}: 3.00 MiB into the page cache in ")
    assert share_of(index) == 1.0
    alone = warm("s3://bucket/model")
    assert alone.stdout.startswith("compile cache: 2 files, 0 B into the page cache in ")
    assert "they lie in an object store" in " ".join(alone.stderr.split())


def test_a_compile_cache_in_an_object_store_is_left_and_the_weights_are_read(cold: Path, warm: Warm) -> None:
    done = warm(cold, COMPILE_CACHE__DIRECTORY="s3://bucket/prefix")
    cache, weights = done.stdout.splitlines()
    assert cache == "compile cache: nothing is read into the page cache: it lies in an object store"
    assert weights.startswith(f"{cold}: 3.00 MiB into the page cache in ")
