"""While a load is under way, whoever looks at memory into which copies are pending waits for them.

Most of torch passes its dispatcher, and a mode of ours there. What reaches memory past it are a few methods and
functions; they are replaced while a load runs. (A function mode would see them too, but it is called for every
attribute of every tensor: some thirty times for each tensor of a model, at a microsecond or more.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .recording import (
    OPENING_METHODS,
    READING_METHODS,
    VIEWING_METHODS,
    VIEWS,
    CopySink,
    RecordingTensor,
    dispatch,
    real,
    reason,
)

aten = torch.ops.aten

# These read and copy where no view will do. (Mostly torch takes them apart before they get here; in inference mode it
# does not.)
_READING_VIEWS = frozenset({aten.reshape, aten.flatten})
_DATA: Any = torch._C.TensorBase.data
_COPY: Any = torch._C.TensorBase.copy_
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_past_the_dispatcher = torch._C._DisableTorchDispatch
_listeners = torch._C._len_torch_dispatch_stack


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
        if not recorded and (packet not in VIEWS or packet in _READING_VIEWS) and self._sink.pending():
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


class SettleBeforeRead:
    """The same for what reaches memory without passing the dispatcher: ``numpy()``, ``tolist()``, ``data_ptr()``, …

    A context manager. The methods are replaced for the whole process, from when the first load begins until the last
    one has ended; they act on loads of their caller's thread.
    """

    def __init__(self, sink: CopySink) -> None:
        self._sink = sink
        self._thread = 0

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        with _lock:
            if not _active:
                _undo.extend(_replace_all())
            _active.setdefault(self._thread, []).append(self._sink)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _lock:
            _active[self._thread].remove(self._sink)
            if not _active[self._thread]:
                del _active[self._thread]
            if not _active:
                while _undo:
                    _undo.pop()()


_lock = threading.Lock()
_active: dict[int, list[CopySink]] = {}  # by thread
_undo: list[Callable[[], object]] = []


def _settle(arguments: Sequence[Any], *, opens: bool) -> None:
    for sink in _active.get(threading.get_ident(), ()):
        if sink.pending():
            settle_all(sink, arguments)
        for argument in arguments if opens else ():
            if isinstance(argument, torch.Tensor):
                sink.opened(argument)


def _looking(original: Callable[..., Any], name: str, *, opens: bool) -> Callable[..., Any]:
    @wraps(original)
    def looked(*args: Any, **kwargs: Any) -> Any:
        if kwargs or any(isinstance(argument, RecordingTensor | list | tuple) for argument in args):
            reason.text = name
            args, kwargs = real(args, shared=opens), real(kwargs, shared=opens)
        _settle([*args, *kwargs.values()], opens=opens)
        return original(*args, **kwargs)

    return looked


def _viewing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Views read nothing: past the dispatcher, unless others listen there, too."""

    @wraps(original)
    def viewed(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if type(tensor) not in _PLAIN or _listeners() != 1:
            return original(tensor, *args, **kwargs)
        with _past_the_dispatcher():
            return original(tensor, *args, **kwargs)

    return viewed


def _copy(target: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if (
        type(source) is RecordingTensor
        and type(target) in _PLAIN
        and source.origin.data is None
        and not (target.requires_grad and torch.is_grad_enabled())
        and _listeners() == 1
        and source.origin.sink.copy(target, source.origin, source.view_of_origin)
    ):
        return target
    if type(source) in _PLAIN and type(target) in _PLAIN and _listeners() == 1:
        _settle((target, source), opens=False)
        with _past_the_dispatcher():
            return _COPY(target, source, *args, **kwargs)
    return _COPY(target, source, *args, **kwargs)


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    reason.text = "data"
    # Torch looks at the left side only, and would take a recording tensor for a real one.
    value = real(value, shared=True)
    _settle([tensor, value], opens=False)
    _DATA.__set__(tensor, value)


def _replace_all() -> list[Callable[[], object]]:
    """Replace what looks at memory past the dispatcher; what to call to undo it."""
    undo = [
        _replace(torch.Tensor, "data", property(_viewing(_DATA.__get__), _set_data)),
        _replace(torch.Tensor, "copy_", wraps(_COPY)(_copy)),
    ]
    undo += [_replace(torch.Tensor, name, _viewing(getattr(torch.Tensor, name))) for name in VIEWING_METHODS]
    for holder, names, opens in (
        (torch.Tensor, OPENING_METHODS, True),
        (torch.Tensor, READING_METHODS, False),
        (torch, ("as_tensor", "asarray"), True),
        (torch, ("tensor",), False),
    ):
        undo += [_replace(holder, name, _looking(getattr(holder, name), name, opens=opens)) for name in names]
    return undo


def _replace(holder: Any, name: str, replacement: object) -> Callable[[], object]:
    """Set an attribute; what to call to have it as it was, unless somebody else has set it since."""
    before = vars(holder).get(name)
    setattr(holder, name, replacement)

    def undo() -> None:
        if vars(holder).get(name) is not replacement:
            return
        if before is None:
            delattr(holder, name)
        else:
            setattr(holder, name, before)

    return undo
