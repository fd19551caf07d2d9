"""``engine-loader warm`` as a person sees it."""

import os
from pathlib import Path

import pytest

from engine_loader.compile_cache.host.versions import module_version
from engine_loader.start.opened_files import list_name, write_list
from tests.cli.running import run
from tests.compile_cache.support import Machine, some_bytes
from tests.support.checkpoints import checkpoint, entry
from tests.support.page_cache import drop, made_cold, share_of


@pytest.fixture(autouse=True)
def no_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the compile cache's store nor the starts of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A model's directory with a file that is not in the page cache."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(checkpoint({"a": entry("U8", [3 << 20])}))
    made_cold(path)
    return tmp_path


def test_a_cold_model_is_read_into_the_page_cache(cold: Path) -> None:
    first = run("warm", cold)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(f"{cold}: 3.00 MiB into the page cache in ")
    assert "were there already" not in first.stdout
    assert "MiB were there already" in run("warm", cold).stdout


def test_the_compile_cache_has_a_line_of_its_own_before_the_weights(
    cold: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("machine")
    machine = Machine(place, place / "store")
    machine.write("inductor/ab/kernel.so", some_bytes(2 << 20))
    machine.save()
    index = machine.packs()[0].with_name("index")
    made_cold(index, *machine.packs())
    env = {"ENGINE_LOADER_COMPILE_CACHE__DIRECTORY": str(place / "store")}
    cache, weights = run("warm", cold, env=env).stdout.splitlines()
    assert cache.startswith("compile cache: 2 files, ")
    assert cache.partition(" into the page cache in ")[1]
    assert weights.startswith(f"{cold}: 3.00 MiB into the page cache in ")
    assert share_of(index) == 1.0
    alone = run("warm", "/missing/model", env=env)
    assert alone.returncode == 1
    assert alone.stdout.startswith("compile cache: 2 files, 0 B into the page cache in ")


def test_a_compile_cache_in_an_object_store_is_left_and_the_weights_are_read(cold: Path) -> None:
    done = run("warm", cold, env={"ENGINE_LOADER_COMPILE_CACHE__DIRECTORY": "s3://bucket/prefix"})
    cache, weights = done.stdout.splitlines()
    assert cache == "compile cache: nothing is read into the page cache: it lies in an object store"
    assert weights.startswith(f"{cold}: 3.00 MiB into the page cache in ")


@pytest.mark.parametrize(
    ("model", "env", "said"),
    [
        ("/missing/model", {}, "No such file or directory"),
        (".", {"ENGINE_LOADER_LOADER__TRANSPORT": "gds"}, "past this machine's memory (loader.transport: gds)"),
    ],
)
def test_what_cannot_be_warmed_is_an_error_with_its_reason(model: str, env: dict[str, str], said: str) -> None:
    done = run("warm", model, env=env)
    assert done.returncode == 1
    assert said in " ".join(done.stderr.split())


def test_a_bad_setting_is_told(tmp_path: Path) -> None:
    done = run("warm", tmp_path, env={"ENGINE_LOADER_START__WARM": "always"})
    assert done.returncode == 2
    assert "ENGINE_LOADER_START__WARM" in done.stderr


@pytest.mark.engine
def test_what_the_last_start_opened_is_read_before_the_weights(
    cold: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("opened")
    files = [place / "a.so", place / "b.pyc"]
    for path in files:
        path.write_bytes(bytes(1 << 20))
        drop(path)
    os.mkfifo(place / "pipe.so")
    listed = [*map(str, files), str(place / "missing.pyc"), str(place / "pipe.so")]
    write_list(place / list_name("vllm", module_version("vllm")), listed)
    env = {"ENGINE_LOADER_REPORT__DIRECTORY": str(place)}
    opened, weights = run("warm", cold, env=env).stdout.splitlines()
    assert opened.startswith("2 .so and .pyc files of the last start: 2.00 MiB into the page cache in ")
    assert weights.startswith(f"{cold}: 3.00 MiB into the page cache in ")
    for path in files:
        assert share_of(path) > 0.9
    alone = run("warm", cold, env={**env, "ENGINE_LOADER_LOADER__TRANSPORT": "gds"})
    assert alone.returncode == 1
    assert alone.stdout.startswith("2 .so and .pyc files of the last start: ")
    assert "they are read past this machine's memory" in " ".join(alone.stderr.split())
