"""A small checkpoint in one file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.loading.direct.model import COLUMNS, ROWS


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(ROWS, COLUMNS),
        "b": torch.randn(ROWS, COLUMNS),
        "scale": torch.tensor(3.0),
        "turned": torch.randn(COLUMNS, ROWS),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"
