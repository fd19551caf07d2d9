"""The real `vllm serve` on CPU: the same completions as vLLM's own loader, and clean ends on bad checkpoints."""

import shutil
from pathlib import Path

import pytest

from tests.engines.ranks.checks import cold_and_restored
from tests.engines.ranks.layouts import SHORT
from tests.engines.ranks.machines import VllmMachines
from tests.support.threefs import emulator
from tests.support.tiny_models import make_model
from tests.support.vllm_server import VllmServer

from .conftest import PROMPT

pytestmark = pytest.mark.engine


def completion(model: Path, load_format: str, *args: str, env: dict[str, str] | None = None) -> tuple[str, str]:
    """What the server answers, and its log."""
    with VllmServer(model, "--load-format", load_format, *args, env=env) as server:
        text = server.complete(PROMPT, max_tokens=24)
    return text, server.log


def test_a_llama_in_shards_answers_as_with_vllms_loader(llama: Path, llama_answer: str) -> None:
    text, log = completion(llama, "b10_3fs", "--model-loader-extra-config", '{"threads": 2}')
    assert llama_answer.strip()
    assert text == llama_answer
    (line,) = [line for line in log.splitlines() if "b10_3fs: loaded" in line]
    assert "3 files" in line
    assert "2 threads" in line


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_ranks_answer_as_one_and_restore_what_they_compiled(llama: Path, llama_answer: str, tmp_path: Path) -> None:
    """The short form of tests/engines/ranks, which has the other layouts. On 3FS, where ranks read once for all."""
    threefs = emulator()
    model = Path(shutil.copytree(llama, threefs.mount / "two-ranks"))
    before = threefs.bytes_of_all
    machines = VllmMachines(tmp_path, model, dtype="bfloat16", **threefs.environment())
    cold, restored = cold_and_restored(machines, SHORT, llama_answer)
    # So small that each rank also reads the gaps between its own slices: apart they read these and the shared tensors.
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    starts, ranks = 2, 2
    assert size < threefs.bytes_of_all - before < starts * (ranks + 0.5) * size
    assert "from usrbio" in cold.nodes[0].log
    assert cold.nodes[0].log.count("b10_3fs: rank 0 of 2: loaded") == 1
    assert "of what 2 ranks share" in cold.nodes[0].log
    assert "saved AOT compiled function to" in cold.nodes[0].log
    assert "saved AOT compiled function to" not in restored.nodes[0].log


@pytest.mark.parametrize(("architecture", "shards"), [("llama-tied", 1), ("mixtral", 4)])
def test_other_models_answer_as_with_vllms_loader(architecture: str, shards: int, tmp_path: Path) -> None:
    model = make_model(architecture, tmp_path, shards=shards)
    expected, _ = completion(model, "auto")
    text, _ = completion(model, "b10_3fs")
    assert expected.strip()
    assert text == expected


def test_a_shard_that_is_cut_short_ends_the_engine_with_its_name(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path, shards=2)
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    log = failed_start(model)
    assert f"{shard}: the data is cut short" in log


def test_an_unknown_option_ends_the_engine_with_the_valid_ones(tmp_path: Path) -> None:
    log = failed_start(make_model("llama", tmp_path), "--model-loader-extra-config", '{"thread": 2}')
    assert "there is no setting" in log
    assert "buffer_bytes" in log


def failed_start(model: Path, *args: str) -> str:
    """The log of a server that must not start. (VllmServer sees to it that no process is left.)"""
    server = VllmServer(model, "--load-format", "b10_3fs", *args)
    with pytest.raises(RuntimeError, match=r"ended with status [1-9]"), server:
        pass
    return server.log
