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
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..formats.safetensors import TensorInfo

aten = torch.ops.aten

_VIEWS = frozenset(
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
# These read and copy where no view will do. (Mostly torch takes them apart before they get here; in inference mode it
# does not.)
_READING_VIEWS = frozenset({aten.reshape, aten.flatten})
_T = torch.Tensor
_SET_DATA = _T.data.__set__  # type: ignore[attr-defined]
# What hands out a tensor's memory past the dispatcher: nobody sees what is read or written there afterwards.
_OPENS = frozenset(
    {
        _T.numpy,
        _T.data_ptr,
        _T.untyped_storage,
        _T.storage,
        _T._typed_storage,
        _T.__array__,
        _T.__dlpack__,
        _T.share_memory_,
        _T.apply_,
        _T.map_,
        _T.map2_,
        torch.as_tensor,
        torch.asarray,
    }
)
# What reads a tensor's memory past the dispatcher, and is done with it.
_READS = frozenset(
    {_T.tolist, _T.__deepcopy__, _T.__reduce_ex__, _T.pin_memory, _T.new_tensor, torch.tensor, _SET_DATA}
)
# What makes another tensor of the object that it is called on.
_TURNS = frozenset(
    {
        _T.t_,
        _T.squeeze_,
        _T.unsqueeze_,
        _T.transpose_,
        _T.swapaxes_,
        _T.swapdims_,
        _T.resize_,
        _T.resize_as_,
        _T.as_strided_,
        _T.set_,
        _SET_DATA,
    }
)


_LOOKED_AT = _OPENS | _READS | _TURNS
_without_subclasses = torch._C.DisableTorchFunctionSubclass


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

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LOOKED_AT:
            args, kwargs = _with_data(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


_OWN = frozenset({"origin", "view_of_origin", "_is_param"})


def recording_tensor(info: TensorInfo, sink: CopySink) -> RecordingTensor:
    """A stand-in for a tensor of the checkpoint."""
    dtype, shape = info.as_torch()
    return RecordingTensor.of(Origin(info, sink), torch.empty(shape, dtype=dtype, device="meta"))


def dispatch(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Carry out an operation of which at least one argument is a recording tensor."""
    packet = func._overloadpacket
    if packet in _VIEWS and type(args[0]) is RecordingTensor:
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
    real_args = [_real(argument, shared=at in positions) for at, argument in enumerate(args)]
    return func(*real_args, **{name: _real(argument, shared=name in names) for name, argument in kwargs.items()})


@cache
def _shared_arguments(func: Any) -> tuple[frozenset[int], frozenset[str]]:
    """Which arguments, by position and by name, the operation writes to, or returns the memory of."""
    arguments = list(enumerate(func._schema.arguments))
    shared = [(at, argument.name) for at, argument in arguments if argument.alias_info is not None]
    return frozenset(at for at, _ in shared), frozenset(name for _, name in shared)


def _with_data(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The arguments with real tensors, where a function looks at memory past the dispatcher."""
    if func in _TURNS or func in _OPENS or func in _READS:
        reason.text = getattr(func, "__name__", str(func))
    if func in _TURNS and args and isinstance(args[0], RecordingTensor):
        args[0].become_real()
    if func in _OPENS or func in _READS:
        # Setting `.data` looks at its left side only, and would take a recording tensor for a real one.
        shared = func in _OPENS or func is _SET_DATA
        return _real(args, shared=shared), _real(kwargs, shared=shared)
    return args, kwargs


def _track_view(func: Any, tensor: RecordingTensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The view as recording tensors, or None where torch would have to copy."""
    origin, view = tensor.origin, tensor.view_of_origin
    result = func(view, *args, **kwargs)
    storage = view.untyped_storage()._cdata
    if isinstance(result, torch.Tensor):
        return RecordingTensor.of(origin, result) if result.untyped_storage()._cdata == storage else None
    if any(part.untyped_storage()._cdata != storage for part in result):
        return None
    return type(result)(RecordingTensor.of(origin, part) for part in result)


def _real(tree: Any, *, shared: bool = False) -> Any:
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


class SettleBeforeUse(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, an operation on memory into which copies are pending waits for them.

    Views are let through: they read nothing. It sees what its own thread does; copies from recording tensors in other
    threads are done at once.
    """

    def __init__(self, sink: CopySink) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sink = sink

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to say so costs microseconds with every call

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        recorded = packet is aten.copy_ and type(args[1]) is RecordingTensor
        if not recorded and (packet not in _VIEWS or packet in _READING_VIEWS) and self._sink.pending():
            settle_all(self._sink, args)
            settle_all(self._sink, kwargs.values())
        return dispatch(func, args, kwargs) if RecordingTensor in types else func(*args, **kwargs)


def settle_all(sink: CopySink, arguments: Iterable[Any]) -> None:
    """Settle every tensor among the arguments of an operation."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            if not isinstance(argument, RecordingTensor):
                sink.settle(argument)
        elif isinstance(argument, list | tuple):
            settle_all(sink, argument)


class SettleBeforeRead(TorchFunctionMode):
    """The same for what reaches memory without passing the dispatcher: ``numpy()``, ``tolist()``, ``data_ptr()``, …"""

    def __init__(self, sink: CopySink) -> None:
        super().__init__()
        self._sink = sink

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # This is called for every attribute of every tensor, so it must be short.
        if func not in _LOOKED_AT:
            if len(types) == 1 and types[0] is RecordingTensor:
                with _without_subclasses():
                    return func(*args, **kwargs)
        else:
            args, kwargs = _with_data(func, args, kwargs)
            settle_all(self._sink, args)
            if func in _OPENS:
                for argument in args:
                    if isinstance(argument, torch.Tensor):
                        self._sink.opened(argument)
        return func(*args, **kwargs)


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
