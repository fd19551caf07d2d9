"""`--model s3://...` with the load format b10_3fs: configuration, tokenizer and weights come from the bucket."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.moto_server import MotoServer
from tests.support.vllm_inprocess import differences, load_state
from tests.support.vllm_server import VllmServer

from .conftest import PROMPT

pytestmark = pytest.mark.engine

URL = "s3://models/whole"


@pytest.fixture(scope="module")
def moto(llama: Path) -> Iterator[MotoServer]:
    with MotoServer() as server:
        server.put("models", {f"whole/{path.name}": path.read_bytes() for path in llama.iterdir()})
        yield server


@pytest.fixture(autouse=True)
def _environment(moto: MotoServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def connections_to(port: int) -> int:
    """How many established TCP connections this process has to a port of this machine."""
    inodes = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:
            continue
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return sum(
        one[3] == "01" and int(one[2].partition(":")[2], 16) == port and f"socket:[{one[9]}]" in inodes
        for one in fields
    )


def test_vllm_loads_it_as_from_a_directory(llama: Path, moto: MotoServer) -> None:
    (expected,) = load_state(llama, "auto")
    (actual,) = load_state(URL, "b10_3fs")
    assert not differences(expected, actual)
    # `vllm snapshot create` refuses a process that has connections.
    gc.collect()
    assert connections_to(int(moto.url.rpartition(":")[2])) == 0


def test_clients_know_it_by_its_url_and_options_of_a_user_are_kept(moto: MotoServer, tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=f"{URL}/", tokenizer=URL, load_format="b10_3fs", model_loader_extra_config={"threads": 3}
    )
    config = arguments.create_engine_config()
    assert config.model_config.served_model_name == URL
    assert Path(config.model_config.model).is_relative_to(tmp_path)
    assert config.model_config.tokenizer == config.model_config.model
    assert config.load_config.model_loader_extra_config == {"threads": 3, "weights_uri": URL}
    assert not list(Path(config.model_config.model).glob("*.safetensors"))

    named = EngineArgs(model=URL, served_model_name="mine", load_format="b10_3fs").create_engine_config()
    assert named.model_config.served_model_name == "mine"


def test_a_server_answers_as_with_the_model_on_disk(llama_answer: str) -> None:
    with VllmServer(URL, "--load-format", "b10_3fs") as server:
        assert server.complete(PROMPT, max_tokens=24) == llama_answer
    (line,) = [line for line in server.log.splitlines() if "b10_3fs: loaded" in line]
    assert "from object_store" in line
