"""SGLang's processes that load no plugins, models in a bucket, and files that only SGLang's own reader reads."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engines.sglang.conftest import NEWEST, model_for_sglang
from tests.engines.sglang.test_offline import answer
from tests.support.sglang_server import python_of

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[3]


def test_a_process_without_plugins_knows_the_format_and_a_bucket_becomes_a_directory() -> None:
    command = [str(python_of(NEWEST)), "-m", "tests.support.sglang.without_plugins"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    found = json.loads(line.removeprefix("ANSWER "))
    loader = "<class 'engine_loader.engines.sglang.loader.B10ModelLoader'>"
    assert found["child"] == ["/models/llama", loader, True, {}]
    extra = '{"threads": 3, "weights_uri": "s3://models/llama"}'
    assert found["bucket"] == ["/local", "/local", extra, "s3://models/llama"]


def test_files_of_pytorch_are_read_by_sglangs_own_reader(tmp_path: Path) -> None:
    model = model_for_sglang("llama", tmp_path / "llama")
    expected, _ = answer(model, "auto")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert answer(model, "b10_3fs")[0] == expected
