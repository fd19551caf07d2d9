"""SGLang's Engine without a server, and the sharded_state checkpoint that it saves."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.engines.sglang.conftest import VERSION, model_for_sglang
from tests.support.sglang_server import SglangServer, patched, python_of

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

OFFLINE = Path(__file__).parents[2] / "support" / "sglang" / "offline.py"
TOKENS = "[5, 17, 100, 42]"


def answer(model: Path, load_format: str, *args: str, **variables: str) -> tuple[str, str]:
    """What an engine answers, and all that it printed."""
    command = [str(python_of(VERSION)), str(OFFLINE), str(model), load_format, TOKENS, *args]
    environment = {**os.environ, **SglangServer.ENVIRONMENT, **variables}
    given = {name: value for name, value in environment.items() if value is not None}
    with patched(VERSION):
        done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=900, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    return json.loads(line.removeprefix("ANSWER ")), said


def test_an_engine_loads_saves_its_state_and_loads_that(tmp_path: Path) -> None:
    model = model_for_sglang("llama", tmp_path / "llama", shards=2)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    expected, said = answer(model, "b10_3fs", str(sharded))
    assert "b10_3fs: loaded" in said
    for path in model.iterdir():
        if not path.name.startswith("model"):
            shutil.copy(path, sharded)
    assert [path.name for path in sharded.glob("*.safetensors")] == ["model-rank-0-part-0.safetensors"]
    text, said = answer(sharded, "b10_3fs")
    assert text == expected
    (line,) = [line for line in said.splitlines() if "b10_3fs: loaded" in line]
    assert "1 files" in line or "1 file" in line
    assert answer(sharded, "sharded_state")[0] == expected, "SGLang's own loader reads it otherwise"


def test_a_sharded_checkpoint_of_another_layout_is_refused(tmp_path: Path) -> None:
    model = model_for_sglang("llama", tmp_path / "llama")
    (model / "model.safetensors").rename(model / "model-rank-0-part-0.safetensors")
    shutil.copy(model / "model-rank-0-part-0.safetensors", model / "model-rank-1-part-0.safetensors")
    server = SglangServer(VERSION, model, "--load-format", "b10_3fs")
    with patched(VERSION), pytest.raises(RuntimeError, match=r"ended with status -?[1-9]"), server:
        pass
    assert "there are files of 2 ranks, and rank 0 of 1 is asked for" in server.log
