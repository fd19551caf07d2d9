"""Recording tensors: stand-ins that an engine's own ``load_weights`` runs over, so that its copies are known before a
byte is read.

A recording tensor has the shape, strides and type of a tensor of the checkpoint, and no data. Views of it (narrow,
slice, transpose, …) are tracked as geometry. A ``copy_`` of the same type into real memory is handed to a ``CopySink``
as "these bytes of this file go there". Anything else reads the tensor and goes on with real data, so the result is
always right.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map

from ...formats.safetensors import TensorInfo

aten = torch.ops.aten

VIEWS = frozenset(
    getattr(aten, name)
    for name in [
        "alias",
        "as_strided",
        "chunk",
        "detach",
        "diagonal",
        "expand",
        "flatten",
        "movedim",
        "narrow",
        "permute",
        "reshape",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "swapaxes",
        "t",
        "transpose",
        "unbind",
        "unflatten",
        "unfold",
        "unsafe_split",
        "_unsafe_view",
        "_reshape_alias",
        "unsqueeze",
        "view",
        "view_as",
    ]
    if hasattr(aten, name)
)
# Not the method of torch.Tensor, which waits for copies while a load is under way (settling.py).
_storage_of = torch._C.TensorBase.untyped_storage
_past_the_dispatcher = torch._C._DisableTorchDispatch
# Methods that hand out a tensor's memory past the dispatcher: nobody sees what is read or written there afterwards.
OPENING_METHODS = (
    "numpy",
    "data_ptr",
    "untyped_storage",
    "storage",
    "_typed_storage",
    "__array__",
    "__dlpack__",
    "share_memory_",
    "apply_",
    "map_",
    "map2_",
)
# Methods that read a tensor's memory past the dispatcher, and are done with it.
READING_METHODS = ("tolist", "__deepcopy__", "__reduce_ex__", "pin_memory", "new_tensor")
# Methods that return views and nothing else. They and those below are taken short cuts for, past the dispatcher, which
# would cost several times as much; the rest of VIEWS goes through it. (``__getitem__`` must, too: to define it makes a
# class a sequence for C, which torch's own is not.)
VIEWING_METHODS = (
    "chunk",
    "detach",
    "expand",
    "narrow",
    "permute",
    "select",
    "split",
    "squeeze",
    "swapaxes",
    "t",
    "transpose",
    "unbind",
    "unflatten",
    "unsqueeze",
)
# Methods that return a view where one will do.
_PERHAPS_VIEWING_METHODS = ("contiguous", "flatten", "reshape", "view")
# Methods that make another tensor of the object that they are called on.
_TURNING_METHODS = (
    "t_",
    "squeeze_",
    "unsqueeze_",
    "transpose_",
    "swapaxes_",
    "swapdims_",
    "resize_",
    "resize_as_",
    "as_strided_",
    "set_",
)


class _Reason(threading.local):
    """What the data of a recording tensor was last needed for, e.g. "aten::mul.Tensor"."""

    text = "it was kept"


reason = _Reason()


class CopySink(Protocol):
    """Where recorded copies go."""

    def copy(self, target: torch.Tensor, origin: Origin, view: torch.Tensor) -> bool:
        """Take over copying ``view`` (geometry within the origin, a meta tensor) into ``target``; False: the caller
        must do it."""
        ...

    def settle(self, tensor: torch.Tensor) -> None:
        """Return when no copy into the tensor's memory is pending; where it is not known where that is, when none
        is."""
        ...

    def opened(self, tensor: torch.Tensor) -> None:
        """The same, and for copies to come too: they are done at once."""
        ...

    def pending(self) -> bool:
        """Whether any copy is pending."""
        ...

    def read(self, origin: Origin, begin: int, nbytes: int) -> torch.Tensor:
        """Read bytes of a tensor now, as they are (uint8); ``reason.text`` says what for."""
        ...


class Origin:
    """One tensor of the checkpoint behind recording tensors.

    Attributes:
        info: where it lies.
        sink: where copies of it go.
        data: the whole tensor, once something needed it.
    """

    __slots__ = ("__weakref__", "data", "info", "sink")

    def __init__(self, info: TensorInfo, sink: CopySink) -> None:
        self.info = info
        self.sink = sink
        self.data: torch.Tensor | None = None

    def whole(self) -> torch.Tensor:
        """The tensor itself; all views share its memory from then on, so that writing to one shows in the others."""
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
        made: RecordingTensor = torch.Tensor._make_wrapper_subclass(
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
        """The data. ``shared``: in memory that all views of the origin share, because it will be written to or kept."""
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
        """Turn into a tensor with data, for everybody who holds this one.

        Raises:
            RuntimeError: torch refuses, because there are weak references to it or views of it.
        """
        real = self.materialise(shared=True)
        if getattr(self, "_is_param", False):
            real = torch.nn.Parameter(real, requires_grad=self.requires_grad)
        for name, value in vars(self).items():
            if name not in _OWN:
                setattr(real, name, value)
        torch.utils.swap_tensors(self, real)  # type: ignore[no-untyped-call]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"RecordingTensor({self.origin.info.name!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    # Everything goes to the dispatcher as it is; what would pass it by is overridden below.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

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


_OWN = frozenset({"origin", "view_of_origin", "_is_param"})


def _on_data(name: str, *, shared: bool) -> Callable[..., Any]:
    original = getattr(torch.Tensor, name)

    @wraps(original)
    def method(self: RecordingTensor, *args: Any, **kwargs: Any) -> Any:
        reason.text = name
        return original(self.materialise(shared=shared), *real(args, shared=shared), **real(kwargs, shared=shared))

    return method


def _on_itself(name: str) -> Callable[..., Any]:
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
        with _past_the_dispatcher():
            result = original(view, *args, **kwargs)
        origin = self.origin
        if type(result) is torch.Tensor:
            if surely or _storage_of(result)._cdata == _storage_of(view)._cdata:
                return RecordingTensor.of(origin, result)
            return original(self, *args, **kwargs)
        return type(result)([RecordingTensor.of(origin, part) for part in result])

    return method


for _name in VIEWING_METHODS:
    setattr(RecordingTensor, _name, _as_view(_name, surely=True))
for _name in _PERHAPS_VIEWING_METHODS:
    setattr(RecordingTensor, _name, _as_view(_name, surely=False))
for _name in OPENING_METHODS:
    setattr(RecordingTensor, _name, _on_data(_name, shared=True))
for _name in READING_METHODS:
    setattr(RecordingTensor, _name, _on_data(_name, shared=False))
for _name in _TURNING_METHODS:
    setattr(RecordingTensor, _name, _on_itself(_name))


def recording_tensor(info: TensorInfo, sink: CopySink) -> RecordingTensor:
    """A stand-in for a tensor of the checkpoint."""
    dtype, shape = info.as_torch()
    with _past_the_dispatcher():
        geometry = torch.empty(shape, dtype=dtype, device="meta")
    return RecordingTensor.of(Origin(info, sink), geometry)


def dispatch(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Carry out an operation of which at least one argument is a recording tensor."""
    packet = func._overloadpacket
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
    """Which arguments, by position and by name, the operation writes to, or returns the memory of."""
    arguments = list(enumerate(func._schema.arguments))
    shared = [(at, argument.name) for at, argument in arguments if argument.alias_info is not None]
    return frozenset(at for at, _ in shared), frozenset(name for _, name in shared)


def _track_view(func: Any, tensor: RecordingTensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The view as recording tensors, or None where torch would have to copy."""
    origin, view = tensor.origin, tensor.view_of_origin
    result = func(view, *args, **kwargs)
    storage = _storage_of(view)._cdata
    if isinstance(result, torch.Tensor):
        return RecordingTensor.of(origin, result) if _storage_of(result)._cdata == storage else None
    if any(_storage_of(part)._cdata != storage for part in result):
        return None
    return type(result)(RecordingTensor.of(origin, part) for part in result)


def real(tree: Any, *, shared: bool = False) -> Any:
    """The arguments of a function, with the data of recording tensors in their place.

    Args:
        tree: a tensor, or lists, tuples and dictionaries of them; anything else stays.
        shared: as of ``RecordingTensor.materialise``.
    """
    if isinstance(tree, RecordingTensor):
        return tree.materialise(shared=shared)
    if not isinstance(tree, list | tuple | dict):
        return tree
    return tree_map(lambda leaf: leaf.materialise(shared=shared) if type(leaf) is RecordingTensor else leaf, tree)


def _bytes_of(view: torch.Tensor) -> tuple[int, int]:
    """(first byte, bytes) that a view reaches over within its tensor."""
    if view.numel() == 0:
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
    itemsize = view.dtype.itemsize
    return int(view.storage_offset()) * itemsize, (int(reach) + 1) * itemsize


def replace_recording_tensors(module: torch.nn.Module) -> list[str]:
    """Put real tensors where a loader left recording ones as parameters, buffers or attributes; the names of those."""
    replaced: list[str] = []
    made: dict[int, torch.Tensor] = {}
    for prefix, part in module.named_modules():
        for kind in (part._parameters, part._buffers, vars(part)):
            for name, value in list(kind.items()):
                if type(value) is not RecordingTensor:
                    continue
                real = made.get(id(value))
                if real is None:
                    real = value.materialise(shared=True)
                    if kind is part._parameters:
                        real = torch.nn.Parameter(real, requires_grad=value.requires_grad)
                    made[id(value)] = real
                kind[name] = real
                replaced.append(f"{prefix}.{name}" if prefix else name)
    return replaced


class LiveOrigins:
    """The origins that somebody still has a recording tensor of."""

    def __init__(self) -> None:
        self._origins: weakref.WeakSet[Origin] = weakref.WeakSet()

    def add(self, origin: Origin) -> None:
        """Follow an origin."""
        self._origins.add(origin)

    def make_real(self) -> None:
        """Read what somebody kept, and turn the recording tensors into real ones, where they are."""
        if not self._origins:
            return
        reason.text = "it was kept"
        gc.collect()  # what only waits to be collected need not be read
        for origin in list(self._origins):
            origin.whole()
        # A tensor is refused while there are views of it, so those come first.
        turned = True
        while turned:
            turned = False
            for kept in [found for found in gc.get_objects() if type(found) is RecordingTensor]:
                if kept.origin in self._origins:
                    # What torch refuses goes on working through its origin's data.
                    with contextlib.suppress(RuntimeError):
                        kept.become_real()
                        turned = True
