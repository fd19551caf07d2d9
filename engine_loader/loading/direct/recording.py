"""Recording tensors: stand-ins over which an engine's own ``load_weights`` runs, so that its copies are known before a
byte is read.

A recording tensor has the shape, strides and type of a tensor of the checkpoint, and no data. Views of it (narrow,
slice, transpose, …) are tracked as geometry. A ``copy_`` of the same type into real memory is handed to a ``CopySink``
as "these bytes of this file go there". Anything else reads the tensor and goes on with real data, so the result is
always right.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, Protocol

import torch

from ...formats.safetensors import TensorInfo
from .torch_methods import (
    EXPOSING_METHODS,
    PERHAPS_VIEWING_METHODS,
    READING_METHODS,
    RESHAPING_METHODS,
    VIEWING_METHODS,
    VIEWS,
    aten,
)
from .torch_private import (
    PARAMETER_MARK,
    aliased_arguments,
    make_wrapper,
    no_torch_function,
    packet_of,
    storage_id,
    storage_of,
    tree_map,
    without_dispatch,
)


class _Reason(threading.local):
    """What this thread last needed the data of a recording tensor for, e.g. "aten::mul.Tensor"."""

    text = "it was kept"


reason = _Reason()


class CopySink(Protocol):
    """Carries out recorded copies."""

    def copy(self, target: torch.Tensor, origin: Origin, view: torch.Tensor) -> bool:
        """Copy ``view`` (geometry within the origin, a meta tensor) into ``target``, now or later; False: the caller
        must do it."""
        ...

    def settle(self, tensor: torch.Tensor) -> None:
        """Wait for the pending copies into the tensor's memory; for all where it is not known where that is."""
        ...

    def expose(self, tensor: torch.Tensor) -> None:
        """The tensor's memory was exposed past the dispatcher (``numpy()``, ``data_ptr()``): from now on copies into it
        are synchronous."""
        ...

    def settle_everything(self) -> None:
        """Wait for all pending copies."""
        ...

    def pending(self) -> bool:
        """Whether any copy is pending."""
        ...

    def read(self, origin: Origin, begin: int, nbytes: int) -> torch.Tensor:
        """Read bytes of a tensor now and return them as uint8, shape (nbytes,); ``reason.text`` says what for."""
        ...


class Origin:
    """One tensor of the checkpoint behind recording tensors.

    Attributes:
        info: name, file, offset, dtype and shape.
        sink: carries out copies of it.
        data: the whole tensor, once it was needed.
    """

    __slots__ = ("__weakref__", "data", "info", "sink")

    def __init__(self, info: TensorInfo, sink: CopySink) -> None:
        self.info = info
        self.sink = sink
        self.data: torch.Tensor | None = None

    def whole(self) -> torch.Tensor:
        """The whole tensor with its data, in its shape; all views of it share this memory from then on, so that what is
        written to one shows in the others."""
        if self.data is None:
            dtype, shape = self.info.as_torch()
            self.data = self.sink.read(self, 0, self.info.nbytes).view(dtype).view(shape)
        return self.data


class RecordingTensor(torch.Tensor):
    """A view of a tensor of the checkpoint, without data. Made by ``recording_tensor``."""

    origin: Origin
    view_of_origin: torch.Tensor

    @staticmethod
    def of(origin: Origin, view: torch.Tensor) -> RecordingTensor:
        """The stand-in for ``view``, a meta tensor that says the geometry."""
        if torch.is_inference_mode_enabled():
            # There, views of normal tensors are normal tensors.
            with torch.inference_mode(False):
                return RecordingTensor.of(origin, view)
        made: RecordingTensor = make_wrapper(
            RecordingTensor,
            view.shape,
            strides=view.stride(),
            storage_offset=view.storage_offset(),
            dtype=view.dtype,
            device=torch.device("cpu"),
        )
        made.origin = origin
        made.view_of_origin = view
        return made

    def materialise(self, *, shared: bool = False) -> torch.Tensor:
        """A tensor with the data of this one.

        Args:
            shared: in memory that all views of the origin share, because it will be written to or kept.
        """
        view, origin = self.view_of_origin, self.origin
        if origin.data is None and not shared:
            begin, nbytes = _bytes_of(view)
            if nbytes * 2 < origin.info.nbytes:
                return origin.sink.read(origin, begin, nbytes).view(view.dtype).as_strided(view.shape, view.stride(), 0)
        whole = origin.whole()
        if whole.dtype != view.dtype:
            whole = whole.reshape(-1).view(view.dtype)
        return whole.as_strided(view.shape, view.stride(), view.storage_offset())

    def become_real(self) -> None:
        """Turn this object into a tensor with data.

        Raises:
            RuntimeError: torch refuses, because weak references to this object or views of it exist.
        """
        real = self.materialise(shared=True)
        if getattr(self, PARAMETER_MARK, False):
            real = torch.nn.Parameter(real, requires_grad=self.requires_grad)
        for name, value in vars(self).items():
            if name not in _OWN:
                setattr(real, name, value)
        torch.utils.swap_tensors(self, real)  # type: ignore[no-untyped-call]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"RecordingTensor({self.origin.info.name!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    # All operations go to the dispatcher as they are; methods that pass it by are overridden below.
    __torch_function__ = no_torch_function

    @property
    def data(self) -> torch.Tensor:
        return RecordingTensor.of(self.origin, self.view_of_origin)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        reason.text = "data"
        self.become_real()
        self.data = value

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


_OWN = frozenset({"origin", "view_of_origin", PARAMETER_MARK})


def _on_data(name: str, *, shared: bool) -> Callable[..., Any]:
    original = getattr(torch.Tensor, name)

    @wraps(original)
    def method(self: RecordingTensor, *args: Any, **kwargs: Any) -> Any:
        reason.text = name
        return original(self.materialise(shared=shared), *real(args, shared=shared), **real(kwargs, shared=shared))

    return method


def _after_becoming_real(name: str) -> Callable[..., Any]:
    @wraps(getattr(torch.Tensor, name))
    def method(self: RecordingTensor, *args: Any, **kwargs: Any) -> Any:
        reason.text = name
        self.become_real()
        return getattr(self, name)(*args, **kwargs)

    return method


def _as_view(name: str, *, surely: bool) -> Callable[..., Any]:
    original = getattr(torch.Tensor, name)

    @wraps(original)
    def method(self: RecordingTensor, *args: Any, **kwargs: Any) -> Any:
        view = self.view_of_origin
        with without_dispatch():
            result = original(view, *args, **kwargs)
        origin = self.origin
        if type(result) is torch.Tensor:
            if surely or storage_id(storage_of(result)) == storage_id(storage_of(view)):
                return RecordingTensor.of(origin, result)
            return original(self, *args, **kwargs)
        return type(result)([RecordingTensor.of(origin, part) for part in result])

    return method


for _name in VIEWING_METHODS:
    setattr(RecordingTensor, _name, _as_view(_name, surely=True))
for _name in PERHAPS_VIEWING_METHODS:
    setattr(RecordingTensor, _name, _as_view(_name, surely=False))
for _name in EXPOSING_METHODS:
    setattr(RecordingTensor, _name, _on_data(_name, shared=True))
for _name in READING_METHODS:
    setattr(RecordingTensor, _name, _on_data(_name, shared=False))
for _name in RESHAPING_METHODS:
    setattr(RecordingTensor, _name, _after_becoming_real(_name))


def recording_tensor(info: TensorInfo, sink: CopySink) -> RecordingTensor:
    """A stand-in for a tensor of the checkpoint, of its shape and dtype."""
    dtype, shape = info.as_torch()
    with without_dispatch():
        geometry = torch.empty(shape, dtype=dtype, device="meta")
    return RecordingTensor.of(Origin(info, sink), geometry)


def dispatch(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Carry out an operation of which at least one argument is a recording tensor."""
    packet = packet_of(func)
    if packet in VIEWS and type(args[0]) is RecordingTensor:
        tracked = _track_view(func, args[0], args[1:], kwargs)
        if tracked is not None:
            return tracked
    elif packet is aten.copy_ and type(args[1]) is RecordingTensor and type(args[0]) is not RecordingTensor:
        target, source = args[0], args[1]
        if source.origin.data is None and source.origin.sink.copy(target, source.origin, source.view_of_origin):
            return target
        source.origin.sink.settle(target)
    if torch.Tag.inplace_view in func.tags and isinstance(args[0], RecordingTensor):
        if packet is aten.detach_:
            return args[0]
        raise NotImplementedError(f"{func} on {args[0]!r}, past torch's functions: set the loader's mode to stream")
    reason.text = func.name()
    positions, names = _shared_arguments(func)
    real_args = [real(argument, shared=at in positions) for at, argument in enumerate(args)]
    return func(*real_args, **{name: real(argument, shared=name in names) for name, argument in kwargs.items()})


@cache
def _shared_arguments(func: Any) -> tuple[frozenset[int], frozenset[str]]:
    """Positions and names of the arguments that the operation writes to, or returns the memory of."""
    shared = list(aliased_arguments(func))
    return frozenset(at for at, _ in shared), frozenset(name for _, name in shared)


def _track_view(func: Any, tensor: RecordingTensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The view as recording tensors, or None where torch would have to copy."""
    origin, view = tensor.origin, tensor.view_of_origin
    result = func(view, *args, **kwargs)
    storage = storage_id(storage_of(view))
    if isinstance(result, torch.Tensor):
        return RecordingTensor.of(origin, result) if storage_id(storage_of(result)) == storage else None
    if any(storage_id(storage_of(part)) != storage for part in result):
        return None
    return type(result)(RecordingTensor.of(origin, part) for part in result)


def real(tree: Any, *, shared: bool = False) -> Any:
    """The arguments of a function, with tensors that have data in place of recording tensors.

    Args:
        tree: a tensor, or lists, tuples and dictionaries of tensors; anything else is returned as it is.
        shared: passed to ``RecordingTensor.materialise``.
    """
    if isinstance(tree, RecordingTensor):
        return tree.materialise(shared=shared)
    if not isinstance(tree, list | tuple | dict):
        return tree
    return tree_map(lambda leaf: leaf.materialise(shared=shared) if type(leaf) is RecordingTensor else leaf, tree)


def _bytes_of(view: torch.Tensor) -> tuple[int, int]:
    """(first byte, number of bytes) of the range within its tensor that a view spans."""
    if view.numel() == 0:
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    itemsize = view.dtype.itemsize
    return int(view.storage_offset()) * itemsize, (int(reach) + 1) * itemsize
