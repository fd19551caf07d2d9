"""What is wrong with options or weights ends vLLM's first process, with the cause in the last line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine_loader import CheckpointError, SettingsError

pytestmark = pytest.mark.engine


@pytest.fixture
def damaged(llama: Path, tmp_path: Path) -> Path:
    """Its second shard is cut short."""
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)
    return tmp_path


def configure(model: Path, **extra: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(model=str(model), load_format="b10_3fs", model_loader_extra_config=extra)
    return arguments.create_engine_config()


def test_damaged_weights_are_found_before_there_is_a_configuration(damaged: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cut short.*model-00002-of-00003|model-00002-of-00003.*cut short"):
        configure(damaged)


def test_so_are_those_of_weights_uri_and_bad_options(llama: Path, damaged: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weights_uri|model-00002"):
        configure(llama, weights_uri=str(damaged))
    with pytest.raises(SettingsError, match=r"thread"):
        configure(llama, thread=3)


def test_so_are_settings_with_which_the_compile_cache_never_works(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = "ENGINE_LOADER_COMPILE_CACHE__"
    off = f"; repair that, or start without it: {prefix}ENABLED=false"
    monkeypatch.setenv(f"{prefix}KEY_FILE", str(tmp_path / "no.key"))
    with pytest.raises(SettingsError) as caught:
        configure(llama)
    cause = f"compile_cache.key_file: could not read {tmp_path}/no.key: No such file or directory"
    assert str(caught.value) == f"the compile cache cannot work: {cause}{off}"
    monkeypatch.setenv(f"{prefix}ENABLED", "false")
    assert configure(llama).load_config.load_format == "b10_3fs"
    monkeypatch.delenv(f"{prefix}ENABLED")
    monkeypatch.delenv(f"{prefix}KEY_FILE")
    (tmp_path / "file").touch()
    monkeypatch.setenv(f"{prefix}DIRECTORY", str(tmp_path / "file" / "store"))
    with pytest.raises(SettingsError) as caught:
        configure(llama)
    cause = f"compile_cache.directory (set by {prefix}DIRECTORY) is {tmp_path}/file/store, and {tmp_path}/file is a "
    assert str(caught.value) == (
        f"the compile cache cannot work: {cause}file, not a directory: name another directory there{off}"
    )
    monkeypatch.setenv(f"{prefix}DIRECTORY", "s3://bucket/caches")
    with pytest.raises(SettingsError, match=r"the compile cache cannot work: s3://bucket/caches"):
        configure(llama)


def test_a_key_mapping_that_cannot_be_imported(llama: Path) -> None:
    with pytest.raises(SettingsError, match=r"key_mapping"):
        configure(llama, key_mapping="no_such_module:function")


def test_what_the_engine_does_not_read_is_not_looked_at(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["mtp.fc.weight"] = "model-00009-of-00003.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "other.safetensors").write_bytes(b"not in the index")
    assert configure(tmp_path).load_config.load_format == "b10_3fs"


def test_the_last_line_of_vllm_serve_is_the_cause(damaged: Path) -> None:
    vllm = str(Path(sys.executable).with_name("vllm"))
    command = [vllm, "serve", str(damaged), "--load-format", "b10_3fs", "--max-model-len", "256"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode not in (0, None)
    last = done.stderr.strip().splitlines()[-1]
    assert "cut short" in last and "model-00002-of-00003.safetensors" in last
    assert "EngineCore" not in done.stdout + done.stderr, "other processes were started"
