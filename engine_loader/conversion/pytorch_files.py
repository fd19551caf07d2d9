"""Weights as ``torch.save`` wrote them (pytorch_model.bin), read for a conversion: nothing in them is run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pickle import UnpicklingError
from typing import Any

import torch

from ..errors import CheckpointError
from ..formats.safetensors import TensorInfo
from ..loading.find import is_pytorch_file, natural_key
from ..loading.training.items import dtype_name
from ..loading.training.torch_load import check_not_quantised, torch_load_words
from ..sources.posix import PosixSource


class PyTorchFiles:
    """The tensors of all PyTorch files in a directory, by name. Their pages are mapped, where the files allow that.

    Args:
        directory: that holds them.

    Raises:
        CheckpointError: there are none, one cannot be read without running its code, holds something else than tensors
            by name, or two hold one name.
    """

    def __init__(self, directory: str) -> None:
        names = sorted(filter(is_pytorch_file, PosixSource().list(directory)), key=natural_key)
        if not names:
            raise CheckpointError("there are no PyTorch files", file=directory)
        self._tensors: dict[str, torch.Tensor] = {}
        self._infos: dict[str, TensorInfo] = {}
        for path in (os.path.join(directory, name) for name in names):
            for name, tensor in _load(path).items():
                if name in self._infos:
                    raise CheckpointError(f"{name!r} is also in {self._infos[name].file}", file=path)
                check_not_quantised(tensor.dtype, name, path)
                dtype = dtype_name(tensor.dtype) or str(tensor.dtype)
                nbytes = tensor.numel() * tensor.itemsize
                self._tensors[name] = tensor.detach()
                self._infos[name] = TensorInfo(name, dtype, tuple(tensor.shape), path, 0, nbytes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Element type, shape and file of a tensor; its offset is not known."""
        return self._infos[name]

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of these, contiguous."""
        for name in names:
            yield name, self._tensors[name].contiguous()


def _load(path: str) -> Mapping[str, torch.Tensor]:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        hint = "only tensors by name are read, and no code of the file is run"
        words = torch_load_words(error).partition(". ")[0]  # of several sentences, the rest is advice
        raise CheckpointError(f"torch cannot load it: {words}", file=path, hint=hint) from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()
    ):
        raise CheckpointError("this holds no dictionary of tensors by name", file=path, hint="save model.state_dict()")
    return loaded


def _can_be_mapped(path: str) -> bool:
    """Whether the file is a zip, as torch has written them since 1.6."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"
