"""What the tests of SGLang share: the versions that they start, and models that these can read."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.sglang_server import python_of
from tests.support.tiny_models import make_model

VERSIONS = os.environ.get("SGLANG_VERSIONS", "0.5.23").split()
NEWEST = VERSIONS[0]


def model_for_sglang(kind: str, directory: Path, **options: Any) -> Path:
    """A tiny model whose tokenizer every version that is started can read."""
    model = make_model(kind, directory, **options)
    if "0.5.9" in VERSIONS:  # its transformers is older than the one that made the tokenizer
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return model


@pytest.fixture(autouse=True, scope="session")
def _environments() -> None:
    missing = [version for version in VERSIONS if not python_of(version).exists()]
    assert not missing, f"SGLang {', '.join(missing)} is not installed: make venv-sglang"
