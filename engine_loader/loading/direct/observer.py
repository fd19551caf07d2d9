"""What a load calls back about each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ...formats.safetensors import TensorInfo
from ...transfer.plan import ExtentRow

# Reasons why a whole tensor is read; other reasons are names of operations or methods.
SMALL = "it is small"
SCATTERED = "its parts do not lie in order"


class LoadObserver(Protocol):
    """Called back by a load about each tensor; see ``dry_run.Explanation``."""

    def on_tensor(self, info: TensorInfo) -> None:
        """The engine is about to be given this tensor."""
        ...

    def on_copy(self, info: TensorInfo, extents: Sequence[ExtentRow]) -> None:
        """All or a part of the tensor is copied into a parameter, as these extents."""
        ...

    def on_read(self, info: TensorInfo, nbytes: int, why: str) -> None:
        """``nbytes`` bytes of the tensor are read as data; ``why``: SMALL, SCATTERED, or what needed them."""
        ...


class NoObserver:
    """A ``LoadObserver`` that ignores what it is called about."""

    def on_tensor(self, info: TensorInfo) -> None:
        return

    def on_copy(self, info: TensorInfo, extents: Sequence[ExtentRow]) -> None:
        return

    def on_read(self, info: TensorInfo, nbytes: int, why: str) -> None:
        return
