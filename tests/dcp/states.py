"""State dicts as trainings have them, and how they compare."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp

from engine_loader import dcp


def training_state() -> dict[str, Any]:
    """Nested, with tensors of many kinds, an optimizer's state and values that are no tensors."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Linear(40, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 30)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 7,
        "name": "a training",
        "list": [1, 2, {"transposed": torch.randn(3, 5).t(), "scalar": torch.tensor(2.5)}],
        "kinds": {str(dtype): torch.arange(40).to(dtype).reshape(4, 10) for dtype in DTYPES},
        "empty": torch.empty(0, 4),
    }


DTYPES = (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.bool, torch.int64)
DTYPES += (torch.float8_e4m3fn, torch.uint16, torch.complex64)


def blank(value: Any) -> Any:
    """The same state dict without its content."""
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(blank(item) for item in value)
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    return type(value)() if isinstance(value, int | float | str | bool) else None


def same(one: Any, other: Any) -> bool:
    """Whether two state dicts are alike, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    return bool(one == other)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save(state: dict[str, Any], path: Path, **options: Any) -> Path:
    """Save with this package's writer."""
    torch_dcp.save(state, storage_writer=dcp.FileSystemWriter(path, **options), no_dist=True)
    return path


def stock_save(state: dict[str, Any], path: Path, **options: Any) -> Path:
    """Save with torch's writer."""
    torch_dcp.save(state, storage_writer=torch_dcp.FileSystemWriter(path, **options), no_dist=True)
    return path


def load(state: dict[str, Any], path: Path, **options: Any) -> dict[str, Any]:
    """Load into ``state`` with this package's reader."""
    torch_dcp.load(state, storage_reader=dcp.FileSystemReader(path, **options), no_dist=True)
    return state
