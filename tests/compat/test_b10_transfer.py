"""The functions of b10_transfer: names, values and variables as programs know them."""

import importlib
import logging
import re
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import engine_loader as b10_transfer
from engine_loader import OperationStatus
from engine_loader.compat import b10_settings
from tests.compile_cache.support import some_bytes
from tests.support.http_service import HttpHandler, HttpService


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
    assert re.fullmatch("[0-9a-f]{16}", info["environment_key"])
    assert info["local_cache_size_mb"] == pytest.approx(1.0)
    assert 0.9 < info["b10fs_cache_size_mb"] < 1.1
    listed = b10_transfer.list_available_caches()
    assert (listed["total_caches"], listed["current_cache_exists"], listed["b10fs_enabled"]) == (1, True, True)
    assert listed["current_environment"] == info["environment_key"]
    (cache,) = listed["caches"]
    assert set(cache) == {"filename", "environment_key", "size_mb", "is_current_environment", "created_time"}
    assert cache["environment_key"] == info["environment_key"]
    assert (tmp_path / "b10fs" / cache["filename"]).is_file()


def test_a_store_that_cannot_be_read_is_told_of(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine.parent / "file").write_bytes(b"")
    monkeypatch.setenv("B10FS_CACHE_DIR", str(machine.parent / "file"))
    listed = b10_transfer.list_available_caches()
    assert "error" in listed and str(machine.parent / "file") in listed["error"]
    assert (listed["caches"], listed["total_caches"], listed["current_cache_exists"]) == ([], 0, False)
    assert b10_transfer.get_cache_info()["b10fs_cache_exists"] is False


def test_the_values_of_a_status_are_those_of_the_package() -> None:
    assert {status.name: status.value for status in OperationStatus} == {
        "SUCCESS": 1,
        "ERROR": 2,
        "DOES_NOT_EXIST": 3,
        "SKIPPED": 4,
    }


def test_nothing_to_save_is_skipped_switched_off_and_too_large_are_errors(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert b10_transfer.save_compile_cache() is OperationStatus.SKIPPED
    (machine / "ab").mkdir(parents=True, exist_ok=True)
    (machine / "ab" / "kernel.so").write_bytes(some_bytes(3 << 20))
    monkeypatch.setenv("MAX_CACHE_SIZE_MB", "1")
    assert b10_transfer.save_compile_cache() is OperationStatus.ERROR
    monkeypatch.setenv("MAX_CACHE_SIZE_MB", "16")
    monkeypatch.setenv("MAX_CACHE_SIZE_CAP_MB", "1")
    assert b10_transfer.save_compile_cache() is OperationStatus.ERROR
    monkeypatch.setenv("MAX_CACHE_SIZE_CAP_MB", "8")
    monkeypatch.setenv("BASETEN_FS_ENABLED", "0")
    assert b10_transfer.save_compile_cache() is OperationStatus.ERROR
    assert b10_transfer.list_available_caches()["b10fs_enabled"] is False
    monkeypatch.setenv("BASETEN_FS_ENABLED", "1")
    assert b10_transfer.save_compile_cache() is OperationStatus.SUCCESS


def test_bad_settings_are_an_error_and_no_exception(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_CACHE_SIZE_CAP_MB", "a lot")
    assert b10_transfer.load_compile_cache() is OperationStatus.ERROR
    monkeypatch.setenv("MAX_CACHE_SIZE_MB", "a lot")
    assert b10_transfer.load_compile_cache() is OperationStatus.ERROR


def test_a_file_is_transferred(machine: Path, tmp_path: Path) -> None:
    importlib.import_module("engine_loader.transfer.plan")  # a package of the function's name, used by any load
    (tmp_path / "source").write_bytes(some_bytes(100_000))
    assert b10_transfer.transfer(str(tmp_path / "source"), str(tmp_path / "deep" / "dest")) is OperationStatus.SUCCESS
    assert (tmp_path / "deep" / "dest").read_bytes() == some_bytes(100_000)
    assert b10_transfer.transfer(str(tmp_path / "none"), str(tmp_path / "dest")) is OperationStatus.ERROR


def test_a_transfer_that_would_fill_the_disk_is_an_error(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").write_bytes(b"x")
    monkeypatch.setenv("MIN_LOCAL_SPACE_MB", str(1 << 20 << 8))
    assert b10_transfer.transfer(tmp_path / "source", tmp_path / "dest") is OperationStatus.ERROR
    monkeypatch.setenv("MIN_LOCAL_SPACE_MB", "1")
    monkeypatch.setenv("LOCAL_SPACE_ARCHIVE_MULTIPLIER", "1e18")
    assert b10_transfer.transfer(tmp_path / "source", tmp_path / "dest") is OperationStatus.ERROR
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    monkeypatch.setenv("LOCAL_SPACE_ARCHIVE_MULTIPLIER", "5")
    monkeypatch.setenv("MIN_B10FS_SPACE_MB", str(1 << 20 << 8))
    assert b10_transfer.transfer(tmp_path / "source", tmp_path / "b10fs" / "dest") is OperationStatus.ERROR
    assert b10_transfer.transfer(tmp_path / "source", tmp_path / "dest") is OperationStatus.SUCCESS


@pytest.fixture
def unset(machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on which nothing says where or whether to cache; b10_transfer's store would be below this directory."""
    monkeypatch.delenv("B10FS_CACHE_DIR")
    monkeypatch.delenv("BASETEN_FS_ENABLED")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(b10_settings, "PUBLISHED_STORE", tmp_path / "model" / "compile_cache")
    b10_settings._tell_once.cache_clear()
    (machine / "ab").mkdir(parents=True)
    (machine / "ab" / "kernel.so").write_bytes(some_bytes(1000))
    return tmp_path / "model"


def warnings_of_defaults(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.endswith("b10_settings")]


def test_it_is_off_as_there_where_nothing_is_set(unset: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert b10_transfer.save_compile_cache() is OperationStatus.ERROR
    assert b10_transfer.load_compile_cache() is OperationStatus.ERROR
    listed = b10_transfer.list_available_caches()
    assert listed["b10fs_enabled"] is False and listed["error"].startswith("b10fs is not enabled")
    (warning,) = warnings_of_defaults(caplog)
    assert "BASETEN_FS_ENABLED is not set" in warning


def test_it_is_on_where_a_store_is_named_in_this_package_s_words(unset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("B10FS_CACHE_DIR", str(unset))
    assert b10_transfer.save_compile_cache() is OperationStatus.ERROR  # as there
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__DIRECTORY", str(unset))
    assert b10_transfer.save_compile_cache() is OperationStatus.SUCCESS
    assert (unset / "engine-loader-store.json").is_file()


def test_its_default_store_is_used_where_it_is(
    unset: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BASETEN_FS_ENABLED", "True")
    assert b10_transfer.save_compile_cache() is OperationStatus.SUCCESS  # there is no /cache/model: the plugin's store
    assert (unset.parent / "home" / ".cache" / "engine_loader" / "compile_cache" / "engine-loader-store.json").is_file()
    assert warnings_of_defaults(caplog) == []
    unset.mkdir()
    assert b10_transfer.save_compile_cache() is OperationStatus.SUCCESS
    assert b10_transfer.save_compile_cache() is OperationStatus.SKIPPED
    assert (unset / "compile_cache" / "engine-loader-store.json").is_file()
    (warning,) = warnings_of_defaults(caplog)
    assert f"the store is {unset / 'compile_cache'}, b10_transfer's default" in warning


def test_beside_archives_of_the_package_the_store_is_a_directory(unset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASETEN_FS_ENABLED", "1")
    archive = unset / "compile_cache" / "cache_0123456789abcdef.latest.tar.gz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"theirs")
    assert b10_transfer.save_compile_cache() is OperationStatus.SUCCESS
    assert (unset / "compile_cache" / "engine_loader" / "engine-loader-store.json").is_file()
    assert archive.read_bytes() == b"theirs"


def test_its_logger(capsys: pytest.CaptureFixture[str]) -> None:
    logger = b10_transfer.get_b10_logger("a.program")
    assert b10_transfer.get_b10_logger("a.program") is logger
    assert (len(logger.handlers), logger.propagate, logger.level) == (1, False, logging.INFO)
    logger.handlers[0].stream = sys.stderr  # type: ignore[attr-defined]
    logger.info("cache %s", "loaded")
    assert capsys.readouterr().err == "INFO - [b10-transfer log] cache loaded\n"


class Ready(HttpHandler):
    """vLLM that is ready when it is asked for the second time."""

    asked = 0

    def do_GET(self) -> None:
        Ready.asked += 1
        self.send_response(200 if Ready.asked > 1 else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def vllm_caches(machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "vllm"
    for name in ("FLASHINFER_WORKSPACE_BASE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(root))
    monkeypatch.setenv("B10_TRANSFER_INTERVAL_S", "0.05")
    (root / "torch_compile_cache" / "0123456789" / "inductor_cache" / "ab").mkdir(parents=True)
    (root / "torch_compile_cache" / "0123456789" / "inductor_cache" / "ab" / "kernel.so").write_bytes(some_bytes(5000))
    return root


def test_the_command_beside_vllm(vllm_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = vllm_caches / "torch_compile_cache" / "0123456789" / "inductor_cache" / "ab" / "kernel.so"
    Ready.asked = 0
    with HttpService(Ready) as server:
        monkeypatch.setenv("B10_TRANSFER_VLLM_URL", f"{server.url}/v1/models")
        b10_transfer.save_vllm_compile_cache()
        assert Ready.asked == 2
        shutil.rmtree(vllm_caches)
        b10_transfer.save_vllm_compile_cache()
        assert Ready.asked == 2, "a cache was restored: there is nothing to wait for"
    assert kernel.read_bytes() == some_bytes(5000)


def test_the_command_s_statuses(vllm_caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("B10_TRANSFER_VLLM_URL", "http://127.0.0.1:9/v1/models")
    monkeypatch.setenv("B10_TRANSFER_TIMEOUT_S", "0.1")
    with pytest.raises(SystemExit) as left:
        b10_transfer.save_vllm_compile_cache()
    assert left.value.code == 2
    monkeypatch.setenv("B10_TRANSFER_TIMEOUT_S", "soon")
    with pytest.raises(SystemExit) as left:
        b10_transfer.save_vllm_compile_cache()
    assert left.value.code == 1
    (command,) = entry_points(group="console_scripts", name="b10-compile-cache")
    assert command.load() is b10_transfer.save_vllm_compile_cache


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
