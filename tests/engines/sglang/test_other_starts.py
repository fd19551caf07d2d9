"""SGLang's processes without plugins, models in a bucket, files that SGLang's own reader reads, Mistral's own files."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines.sglang.conftest import VERSION, model_for_sglang
from tests.engines.sglang.serving import FORMAT, PROMPT, Served, digests, loaded_lines, running, served
from tests.support.moto_server import MotoServer
from tests.support.sglang_server import python_of

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[3]


def test_a_process_without_plugins_knows_the_format_and_a_bucket_becomes_a_directory() -> None:
    command = [str(python_of(VERSION)), "-m", "tests.support.sglang.without_plugins"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    found = json.loads(line.removeprefix("ANSWER "))
    loader = "<class 'engine_loader.engines.sglang.loader.B10ModelLoader'>"
    assert found["child"] == ["/models/llama", loader, True, {}]
    extra = '{"threads": 3, "weights_uri": "s3://models/llama"}'
    assert found["bucket"] == ["/local", "/local", extra, "s3://models/llama"]


def test_files_of_pytorch_are_read_by_sglangs_own_reader(expected: Served, tmp_path: Path) -> None:
    model = model_for_sglang("llama", tmp_path / "llama")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert served(VERSION, model, tmp_path / "b10", *FORMAT).parameters == expected.parameters


def test_a_server_of_a_model_in_a_bucket_answers_as_with_the_model_on_disk(
    llama: Path, expected: Served, tmp_path: Path
) -> None:
    url = "s3://models/whole"
    with MotoServer() as moto:
        moto.put("models", {f"whole/{path.name}": path.read_bytes() for path in llama.iterdir()})
        environment = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_ENDPOINT_URL": moto.url,
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }
        with running(VERSION, url, tmp_path / "b10", *FORMAT, env=environment) as server:
            assert server.complete(PROMPT, max_tokens=24) == expected.text
            (name,) = [model["id"] for model in server.get("/v1/models")["data"]]
        assert digests(tmp_path / "b10") == expected.parameters
    assert name == (url if VERSION != "0.5.9" else "whole")
    (line,) = loaded_lines(server.log)
    assert "21 tensors, 3 files" in line
    assert "from object_store" in line
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_mistrals_own_files_are_taken_where_sglang_takes_them(expected: Served, tmp_path: Path) -> None:
    model = model_for_sglang("llama", tmp_path / "llama")
    (model / "model.safetensors").rename(model / "consolidated.safetensors")
    save_file({"model.norm.weight": torch.zeros(128)}, model / "adapter.safetensors", metadata={"format": "pt"})
    for load_format in (FORMAT, ("--load-format", "auto")):
        found = served(VERSION, model, tmp_path / load_format[1], *load_format)
        assert found.parameters == expected.parameters
        assert found.text == expected.text
        assert load_format != FORMAT or "21 tensors, 1 files" in loaded_lines(found.log)[0]
