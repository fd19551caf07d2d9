"""While a load is under way, code that reads or writes memory into which copies are pending waits for them.

Most of torch goes through its dispatcher, where a dispatch mode of this module sees it. A few methods and functions
reach memory past the dispatcher; they are replaced while a load runs. (A function mode would see them too, but it is
called for every attribute of every tensor: some thirty times for each tensor of a model, at a microsecond or more.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from types import TracebackType
from typing import Any, Self

import torch

from .meetings import is_collective, places_to_meet
from .recording import CopySink, RecordingTensor, dispatch, real, reason
from .torch_methods import EXPOSING_METHODS, READING_METHODS, READING_VIEWS, VIEWING_METHODS, VIEWS, aten
from .torch_private import (
    DispatchMode,
    copy_into,
    data_property,
    dispatch_mode_count,
    dispatch_modes,
    packet_of,
    without_dispatch,
)

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


class SettleBeforeUse(DispatchMode):
    """A dispatch mode: while it is active, an operation on memory into which copies are pending waits for them.

    Views do not wait: they read nothing. The mode sees only its own thread; copies from recording tensors in other
    threads are synchronous.
    """

    def __init__(self, sink: CopySink) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sink = sink

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = packet_of(func)
        recorded = packet is aten.copy_ and type(args[1]) is RecordingTensor
        if not recorded and (packet not in VIEWS or packet in READING_VIEWS) and self._sink.pending():
            if is_collective(packet):
                self._sink.settle_everything()
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


class ModeSwitch:
    """Puts a ``SettleBeforeUse`` on the stack of dispatch modes of the thread that makes the switch, and takes it off.

    Attributes:
        is_on: whether the mode is on the stack.
    """

    def __init__(self, sink: CopySink) -> None:
        self.is_on = False
        self._mode = SettleBeforeUse(sink)
        self._thread = threading.get_ident()

    def put_on(self) -> None:
        """Put the mode on the stack."""
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        self.is_on = True

    def take_off(self) -> None:
        """Take the mode off the stack where it is on it."""
        # By the stack itself: Ctrl-C may come between a change of it and ``is_on``.
        if any(mode is self._mode for mode in dispatch_modes()):
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self.is_on = False

    def put_on_alone(self) -> bool:
        """Put the mode on if the stack of the calling thread is empty.

        Returns:
            False: in another thread, or where a mode of the engine is active: the engine would take off the topmost
            mode, which would be ours.
        """
        if dispatch_mode_count() or threading.get_ident() != self._thread:
            return False
        self.put_on()
        return True

    def is_alone(self) -> bool:
        """Whether the mode is the only one on the stack of the calling thread."""
        return threading.get_ident() == self._thread and dispatch_mode_count() == 1

    def sees_caller(self) -> bool:
        """Whether the mode sees the operations of the calling thread."""
        return self.is_on and threading.get_ident() == self._thread


class SettleBeforeRead:
    """Waits for pending copies where memory is reached past the dispatcher: ``numpy()``, ``tolist()``, ``data_ptr()``…

    A context manager. It replaces those methods for the whole process, from the start of the first load to the end of
    the last; they act on loads of the thread that calls them.
    """

    def __init__(self, sink: CopySink) -> None:
        self._sink = sink
        self._thread = 0

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        with _lock:
            if not _active:
                for undo in _replace_all():  # one by one, for Ctrl-C may come between
                    _undo.append(undo)
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
                try:
                    _undo_all()
                except KeyboardInterrupt:
                    _undo_all()  # what stayed replaced would stay so for the life of the process
                    raise


_lock = threading.Lock()
_active: dict[int, list[CopySink]] = {}  # by thread
_undo: list[Callable[[], object]] = []


def _undo_all() -> None:
    while _undo:
        _undo[-1]()  # to do it twice does no harm
        _undo.pop()


def _settle(arguments: Sequence[Any], *, exposes: bool) -> None:
    for sink in _active.get(threading.get_ident(), ()):
        if sink.pending():
            settle_all(sink, arguments)
        for argument in arguments if exposes else ():
            if isinstance(argument, torch.Tensor):
                sink.expose(argument)


def _settling(original: Callable[..., Any], name: str, *, exposes: bool) -> Callable[..., Any]:
    @wraps(original)
    def settled(*args: Any, **kwargs: Any) -> Any:
        if kwargs or any(isinstance(argument, RecordingTensor | list | tuple) for argument in args):
            reason.text = name
            args, kwargs = real(args, shared=exposes), real(kwargs, shared=exposes)
        _settle([*args, *kwargs.values()], exposes=exposes)
        return original(*args, **kwargs)

    return settled


def _meeting(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function by which processes wait for each other: all that was copied before it is there for the others."""
    settling = _settling(original, name, exposes=False)

    @wraps(original)
    def met(*args: Any, **kwargs: Any) -> Any:
        for sink in _active.get(threading.get_ident(), ()):
            sink.settle_everything()
        return settling(*args, **kwargs)

    return met


def _viewing(original: Callable[..., Any]) -> Callable[..., Any]:
    """A method that returns a view and reads nothing: past the dispatcher, unless other modes are active, too."""

    @wraps(original)
    def viewed(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if type(tensor) not in _PLAIN or dispatch_mode_count() != 1:
            return original(tensor, *args, **kwargs)
        with without_dispatch():
            return original(tensor, *args, **kwargs)

    return viewed


def _copy(target: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if (
        type(source) is RecordingTensor
        and type(target) in _PLAIN
        and source.origin.data is None
        and not (target.requires_grad and torch.is_grad_enabled())
        and dispatch_mode_count() == 1
        and source.origin.sink.copy(target, source.origin, source.view_of_origin)
    ):
        return target
    if type(source) in _PLAIN and type(target) in _PLAIN and dispatch_mode_count() == 1:
        _settle((target, source), exposes=False)
        with without_dispatch():
            return copy_into(target, source, *args, **kwargs)
    return copy_into(target, source, *args, **kwargs)


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    reason.text = "data"
    # Torch looks at ``tensor`` only, and would take a recording tensor as ``value`` for a real one.
    value = real(value, shared=True)
    _settle([tensor, value], exposes=False)
    data_property.__set__(tensor, value)


def _replace_all() -> Iterator[Callable[[], object]]:
    """Replace the methods that reach memory past the dispatcher; yields functions that undo it."""
    yield _replace(torch.Tensor, "data", property(_viewing(data_property.__get__), _set_data))
    yield _replace(torch.Tensor, "copy_", wraps(copy_into)(_copy))
    for name in VIEWING_METHODS:
        yield _replace(torch.Tensor, name, _viewing(getattr(torch.Tensor, name)))
    for holder, names, exposes in (
        (torch.Tensor, EXPOSING_METHODS, True),
        (torch.Tensor, READING_METHODS, False),
        (torch, ("as_tensor", "asarray"), True),
        (torch, ("tensor",), False),
    ):
        for name in names:
            yield _replace(holder, name, _settling(getattr(holder, name), name, exposes=exposes))
    for place, methods in places_to_meet():
        for name in methods:
            yield _replace(place, name, _meeting(getattr(place, name), name))


def _replace(holder: Any, name: str, replacement: object) -> Callable[[], object]:
    """Set an attribute; returns a function that restores it, unless other code has set it since."""
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
