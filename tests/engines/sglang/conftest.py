"""What the tests of SGLang share: the version that they start, models that it can read, and what one is like by its own
loader.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.sglang_server import python_of
from tests.support.tiny_models import make_model

from .serving import Served, served

VERSION = os.environ.get("SGLANG_VERSION", "0.5.23")


def model_for_sglang(kind: str, directory: Path, **options: Any) -> Path:
    """A tiny model whose tokenizer and configuration every version can read."""
    model = make_model(kind, directory, **options)
    if VERSION == "0.5.9":  # its transformers is older than the one that made them
        _change(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        config = json.loads((model / "config.json").read_text())
        if "num_local_experts" in config:
            _change(model / "config.json", num_experts=config["num_local_experts"])
    return model


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(autouse=True, scope="session")
def _environment() -> None:
    assert python_of(VERSION).exists(), f"SGLang {VERSION} is not installed: make venv-sglang"


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_for_sglang("llama", tmp_path_factory.mktemp("llama"), shards=3)


@pytest.fixture(scope="session")
def expected(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """What SGLang's own loader makes of ``llama``."""
    return served(VERSION, llama, tmp_path_factory.mktemp("expected"), "--load-format", "auto")
