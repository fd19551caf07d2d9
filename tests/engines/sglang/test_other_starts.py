"""SGLang's processes that load no plugins, and models in a bucket."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.engines.sglang.conftest import VERSION
from tests.engines.sglang.serving import FORMAT, PROMPT, Served, digests, loaded_lines, running
from tests.support.moto_server import MotoServer
from tests.support.sglang_server import WITHOUT_PLUGINS, python_of

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(VERSION in WITHOUT_PLUGINS, reason="this version loads no plugins at all")
def test_a_process_without_plugins_knows_the_format_and_a_bucket_becomes_a_directory(llama: Path) -> None:
    command = [str(python_of(VERSION)), "-m", "tests.support.sglang.without_plugins", str(llama)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    found = json.loads(line.removeprefix("ANSWER "))
    loader = "<class 'engine_loader.engines.sglang.loader.B10ModelLoader'>"
    assert found["child"] == [str(llama), loader, True, {}]
    extra = '{"threads": 3, "weights_uri": "s3://models/llama"}'
    assert found["bucket"] == [str(llama), str(llama), extra, "s3://models/llama"]


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
