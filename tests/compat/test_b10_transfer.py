"""The functions of b10_transfer: names, values and variables as programs know them."""

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import engine_loader as b10_transfer
from engine_loader import OperationStatus
from tests.compile_cache.support import some_bytes


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inductor's directory on this machine; the variables are those of b10_transfer."""
    local = tmp_path / "inductor"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TORCH_CACHE_DIR", str(local))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("B10FS_CACHE_DIR", str(tmp_path / "b10fs"))
    monkeypatch.setenv("MIN_LOCAL_SPACE_MB", "1")
    monkeypatch.setenv("MIN_B10FS_SPACE_MB", "1")
    monkeypatch.setenv("BASETEN_FS_ENABLED", "1")
    return local


def test_load_save_load(machine: Path) -> None:
    assert b10_transfer.load_compile_cache() is OperationStatus.DOES_NOT_EXIST
    (machine / "ab").mkdir(parents=True)
    (machine / "ab" / "kernel.so").write_bytes(some_bytes(2 << 20))
    assert b10_transfer.save_compile_cache() is OperationStatus.SUCCESS
    assert b10_transfer.save_compile_cache() is OperationStatus.SKIPPED
    assert b10_transfer.load_compile_cache() is OperationStatus.SKIPPED
    assert b10_transfer.clear_local_cache()
    assert not machine.exists()
    assert b10_transfer.load_compile_cache() is OperationStatus.SUCCESS
    assert (machine / "ab" / "kernel.so").read_bytes() == some_bytes(2 << 20)


def test_a_status_is_true_when_a_cache_is_in_place() -> None:
    assert OperationStatus.SUCCESS and OperationStatus.SKIPPED
    assert not OperationStatus.ERROR and not OperationStatus.DOES_NOT_EXIST


def test_info_and_list_have_the_keys_that_programs_read(machine: Path, tmp_path: Path) -> None:
    info = b10_transfer.get_cache_info()
    assert info["b10fs_enabled"] is True
    assert (info["local_cache_exists"], info["b10fs_cache_exists"]) == (False, False)
    (machine / "ab").mkdir(parents=True)
    (machine / "ab" / "kernel.so").write_bytes(some_bytes(1 << 20))
    b10_transfer.save_compile_cache()
    info = b10_transfer.get_cache_info()
    assert info["environment_key"].startswith("torch-")
    assert info["local_cache_size_mb"] == pytest.approx(1.0)
    assert 0.9 < info["b10fs_cache_size_mb"] < 1.1
    listed = b10_transfer.list_available_caches()
    assert (listed["total_caches"], listed["current_cache_exists"], listed["b10fs_enabled"]) == (1, True, True)
    assert listed["current_environment"] == info["environment_key"]
    (cache,) = listed["caches"]
    assert set(cache) == {"filename", "environment_key", "size_mb", "is_current_environment", "created_time"}
    assert cache["environment_key"] == info["environment_key"]
    assert (tmp_path / "b10fs" / cache["filename"]).is_file()


def test_nothing_to_save_switched_off_and_too_large_are_errors(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert b10_transfer.save_compile_cache() is OperationStatus.ERROR
    (machine / "ab").mkdir(parents=True, exist_ok=True)
    (machine / "ab" / "kernel.so").write_bytes(some_bytes(3 << 20))
    monkeypatch.setenv("MAX_CACHE_SIZE_MB", "1")
    assert b10_transfer.save_compile_cache() is OperationStatus.ERROR
    monkeypatch.setenv("MAX_CACHE_SIZE_MB", "16")
    monkeypatch.setenv("BASETEN_FS_ENABLED", "0")
    assert b10_transfer.save_compile_cache() is OperationStatus.ERROR
    assert b10_transfer.list_available_caches()["b10fs_enabled"] is False
    monkeypatch.setenv("BASETEN_FS_ENABLED", "1")
    assert b10_transfer.save_compile_cache() is OperationStatus.SUCCESS


def test_bad_settings_are_an_error_and_no_exception(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_CACHE_SIZE_MB", "a lot")
    assert b10_transfer.load_compile_cache() is OperationStatus.ERROR


def test_a_file_is_transferred(machine: Path, tmp_path: Path) -> None:
    importlib.import_module("engine_loader.transfer.plan")  # a package of the function's name, used by any load
    (tmp_path / "source").write_bytes(some_bytes(100_000))
    assert b10_transfer.transfer(str(tmp_path / "source"), str(tmp_path / "deep" / "dest")) is OperationStatus.SUCCESS
    assert (tmp_path / "deep" / "dest").read_bytes() == some_bytes(100_000)
    assert b10_transfer.transfer(str(tmp_path / "none"), str(tmp_path / "dest")) is OperationStatus.DOES_NOT_EXIST


def test_a_transfer_that_would_fill_the_disk_is_an_error(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").write_bytes(b"x")
    monkeypatch.setenv("MIN_LOCAL_SPACE_MB", str(1 << 20 << 8))
    assert b10_transfer.transfer(tmp_path / "source", tmp_path / "dest") is OperationStatus.ERROR
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_exceptions_are_there() -> None:
    assert issubclass(b10_transfer.CacheValidationError, b10_transfer.CacheError)
    assert issubclass(b10_transfer.CacheOperationInterrupted, b10_transfer.CacheError)


def test_the_package_of_the_functions_name_is_imported_as_any_other() -> None:
    from engine_loader.transfer import plan

    assert importlib.import_module("engine_loader.transfer") is b10_transfer.transfer
    assert sys.modules["engine_loader.transfer.plan"] is plan
    assert b10_transfer.transfer.plan is plan  # type: ignore[attr-defined]


def test_the_drop_in_module_has_every_name_of_the_package() -> None:
    from engine_loader.compat import b10_transfer as drop_in

    for name in set(drop_in.__all__) - {"transfer"}:
        assert getattr(b10_transfer, name) is getattr(drop_in, name)


@pytest.mark.slow
def test_a_model_py_with_torch_compile_finds_its_kernels_again(machine: Path) -> None:
    """A program as b10_transfer's documentation shows it, in two processes."""
    program = """
        import torch
        import engine_loader as b10_transfer
        from torch._dynamo.utils import counters

        loaded = b10_transfer.load_compile_cache()
        compiled = torch.compile(lambda x: torch.nn.functional.gelu(x @ x.T).sum(0))
        print(float(compiled(torch.ones(8, 8)).sum()))
        if not loaded:
            print(b10_transfer.save_compile_cache())
        hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
        print(loaded, "hits", hits)
    """

    def run() -> list[str]:
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )
        return result.stdout.split("\n")[:-1]

    first = run()
    assert first[1:] == ["OperationStatus.SUCCESS", "OperationStatus.DOES_NOT_EXIST hits 0"]
    b10_transfer.clear_local_cache()
    second = run()
    assert second[0] == first[0]
    assert second[1].startswith("OperationStatus.SUCCESS hits ")
    assert not second[1].endswith(" 0")
