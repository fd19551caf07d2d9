"""safetensors' ``safe_open`` and ``load_file``, over this package's reader, and a way to put them under a library.

``replacing_safetensors`` exchanges both in the modules of one library for as long as a block runs, and nowhere else.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import torch

from ..errors import CheckpointError
from ..loading.checkpoint import Checkpoint, open_checkpoint
from ..loading.slices import TensorSlice

__all__ = ["load_file", "replacing_safetensors", "safe_open"]

_FRAMEWORKS = ("pt", "torch", "pytorch")
_BACKENDS = ("mmap", "pread")
_LATE = {"transformers": ("modeling_utils", "modeling_layers", "integrations.accelerate")}
"""Modules that have one of the functions and that a library imports only when something of it is used."""


class safe_open:
    """Opens a .safetensors file; its tensors are read when they are asked for, by this package's reader.

    Args:
        filename: of the file, or the URL of an object.
        framework: "pt": tensors are torch's.
        device: where they are put, as torch names it; a number is a CUDA device.
        backend: safetensors' way of reading; passed over.

    Raises:
        FileNotFoundError: there is no such file (a CheckpointError, too).
        CheckpointError: it is no safetensors file, or (from each method) it was closed.
        ValueError: another framework, or a backend that safetensors has not.
    """

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str,
        device: str | int | torch.device = "cpu",
        *,
        backend: str = "mmap",
    ) -> None:
        if framework not in _FRAMEWORKS:
            raise ValueError(f"framework is {framework!r}; it must be 'pt': tensors are torch's")
        if backend not in _BACKENDS:
            raise ValueError(f"backend is {backend!r}; safetensors has {' and '.join(_BACKENDS)}")
        self._filename = os.fspath(filename)
        on = torch.device("cuda", device) if isinstance(device, int) else device
        self._checkpoint: Checkpoint | None = open_checkpoint([self._filename], device=on)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None:
            checkpoint.close()

    def keys(self) -> list[str]:
        """The names of the tensors, sorted."""
        return sorted(self._open())

    def offset_keys(self) -> list[str]:
        """The names of the tensors, in the order in which they lie in the file."""
        return self._open().keys()

    def metadata(self) -> dict[str, str] | None:
        """The ``__metadata__`` of the file, or None."""
        return self._open().metadata() or None

    def get_tensor(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            TensorNotFoundError: there is none of that name (a KeyError, too).
        """
        return self._open().get_tensor(name)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """Read all tensors."""
        return dict(self._open().tensors())

    def get_slice(self, name: str) -> TensorSlice:
        """A tensor of which ``[index]`` reads a part, with ``get_shape()`` and ``get_dtype()``.

        Raises:
            TensorNotFoundError: there is none of that name (a KeyError, too).
        """
        return self._open().get_slice(name)

    def _open(self) -> Checkpoint:
        if self._checkpoint is None:
            raise CheckpointError("File is closed", file=self._filename)  # safetensors' words
        return self._checkpoint


def load_file(
    filename: str | os.PathLike[str], device: str | int | torch.device = "cpu", *, backend: str = "mmap"
) -> dict[str, torch.Tensor]:
    """All tensors of a .safetensors file by their names; arguments and errors as of ``safe_open``."""
    with safe_open(filename, "pt", device, backend=backend) as file:
        return file.get_tensors()


@contextmanager
def replacing_safetensors(*libraries: str) -> Iterator[None]:
    """Exchange safetensors' ``safe_open`` and ``load_file`` in libraries while a ``with`` block runs.

    Only attributes of their modules that are these functions are exchanged: safetensors itself, and what other
    libraries have of it, stay as they are. A module that a library imports within the block is not exchanged.

    Args:
        libraries: names of packages, e.g. "transformers", "diffusers", "accelerate"; none: transformers.

    Raises:
        ImportError: safetensors or one of the libraries is not installed.

    Example:
        >>> with engine_loader.replacing_safetensors("transformers"):
        ...     model = AutoModelForCausalLM.from_pretrained("model/")
    """
    import safetensors
    import safetensors.torch

    ours = {id(safetensors.safe_open): safe_open, id(safetensors.torch.load_file): load_file}
    exchanged: list[tuple[Any, str, Any]] = []
    try:
        for library in libraries or ("transformers",):
            importlib.import_module(library)
            for name in _LATE.get(library, ()):
                with suppress(ImportError):  # of another version
                    importlib.import_module(f"{library}.{name}")
            for module in _modules_of(library):
                for attribute, value in list(vars(module).items()):
                    if id(value) in ours:
                        exchanged.append((module, attribute, value))
                        setattr(module, attribute, ours[id(value)])
        yield
    finally:
        for module, attribute, value in reversed(exchanged):
            setattr(module, attribute, value)


def _modules_of(library: str) -> list[Any]:
    return [
        module
        for name, module in list(sys.modules.items())
        if module is not None and (name == library or name.startswith(f"{library}."))
    ]
