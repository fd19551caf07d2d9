"""What several of these tests need: a tiny Llama, what vLLM's own loader makes it answer, and vLLM's log."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tiny_models import make_model
from tests.support.vllm_server import VllmServer

PROMPT = "the quick brown fox"


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In three shards; not to be changed."""
    return make_model("llama", tmp_path_factory.mktemp("llama"), shards=3)


@pytest.fixture(scope="session")
def llama_answer(llama: Path) -> str:
    """The 24 tokens behind PROMPT with vLLM's own loader."""
    with VllmServer(llama, "--load-format", "auto") as server:
        return server.complete(PROMPT, max_tokens=24)


@pytest.fixture
def vllm_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """vLLM's logger does not propagate, so pytest sees nothing of it by itself."""
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield caplog
    logger.setLevel(level)
    logger.removeHandler(caplog.handler)
