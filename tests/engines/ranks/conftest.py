"""What one rank answers, which every layout has to answer, too."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.support.tiny_models import make_model
from tests.support.vllm_server import VllmServer

from .machines import PROMPT, START_TIMEOUT_S, TOKENS


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Architecture -> a tiny model of it, made once."""
    return cache(lambda kind: make_model(kind, tmp_path_factory.mktemp(kind), shards=2))


@pytest.fixture(scope="session")
def one_rank(model: Callable[[str], Path]) -> Callable[[str], str]:
    """Architecture -> what one rank answers, with vLLM's own loader."""

    def answer(kind: str) -> str:
        arguments = ("--load-format", "auto", "--dtype", "float32")
        with VllmServer(model(kind), *arguments, start_timeout_s=START_TIMEOUT_S) as server:
            return server.complete(PROMPT, max_tokens=TOKENS)

    return cache(answer)
