"""The template: a copy of an engine's first process, made while it is still clean, from which others are forked.

A ``Template`` is the end that asks, in the process that made it. The template itself waits on a socket for descriptors,
forks a child twice, so that it becomes a child of the process that asked, and goes on waiting. It ends with the process
that made it.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver, resource_tracker, spawn
from typing import Any, NoReturn

from .fitness import why_not_here
from .handover import Mend, Surroundings, receive_message
from .process_tree import TreeError, adopting, fork_orphan

MOST_DESCRIPTORS = 200
_ANSWER_BYTES = 4096
IDLE_S = 900.0
"""A template that was not asked for so long ends: what starts later is spawned."""
NAME = "engine_loader_t"


class NoTemplateError(Exception):
    """No child was made; the message is the reason."""


@dataclass
class Template:
    """The asking end of a template.

    Attributes:
        pid: of the template.
        environ: in which what it has imported was imported.
    """

    pid: int
    environ: Mapping[str, str]
    _socket: socket.socket
    _timeout_s: float
    _lock: threading.Lock

    @classmethod
    def make(
        cls,
        environ: Mapping[str, str],
        *,
        imports: Iterable[str] = (),
        mend: Mend | None = None,
        on_birth: Callable[[Template | None], None],
        timeout_s: float = 120.0,
    ) -> Template:
        """Copy this process, which must be fit for it (``why_not_here``).

        Args:
            environ: in which this process has imported what it has.
            imports: modules that the copy imports beside; one that cannot be imported is passed over.
            mend: called in children, see ``Mend``.
            on_birth: called in each child with the template that it may ask for children of its own, or None.
            timeout_s: seconds that a child is waited for.

        Raises:
            OSError: there is no memory, or there are too many processes.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            _serve(theirs, _Kit(environ, tuple(imports), mend, on_birth, timeout_s))
        theirs.close()
        ours.settimeout(timeout_s)
        return cls(pid, environ, ours, timeout_s, threading.Lock())

    def fork(self, descriptors: Sequence[int], *, again: bool) -> int:
        """The process id of a new child of this process. It reads from the first descriptor what it is to be.

        Args:
            descriptors: for the child: where it reads, one that it keeps open as long as it lives, that of
                multiprocessing's resource tracker, and those that it is given.
            again: whether it gets a template of its own.

        Raises:
            NoTemplateError: there is none; the message says why.
        """
        with self._lock:
            try:
                with adopting():
                    return self._ask(descriptors, again=again)
            except TreeError as error:
                raise NoTemplateError(str(error)) from None
            except (OSError, ValueError) as error:
                self._socket.close()
                raise NoTemplateError(f"the template does not answer ({error or type(error).__name__})") from None

    def _ask(self, descriptors: Sequence[int], *, again: bool) -> int:
        if len(descriptors) > MOST_DESCRIPTORS:
            raise NoTemplateError(f"the process is given {len(descriptors)} descriptors")
        request = json.dumps({"parent": os.getpid(), "again": again}).encode()
        socket.send_fds(self._socket, [request], list(descriptors))
        answer = self._socket.recv(_ANSWER_BYTES)
        if not answer:
            raise OSError("it has ended")
        said = json.loads(answer)
        if "refused" in said:
            raise NoTemplateError(str(said["refused"]))
        return int(said["pid"])

    def close(self) -> None:
        """Let the template end."""
        self._socket.close()


@dataclass(frozen=True)
class _Kit:
    environ: Mapping[str, str]
    imports: Sequence[str]
    mend: Mend | None
    on_birth: Callable[[Template | None], None]
    timeout_s: float

    def again(self) -> Template | None:
        """A template for a child, which is as clean as this one; None where there is no memory for it."""
        try:
            return Template.make(self.environ, mend=self.mend, on_birth=self.on_birth, timeout_s=self.timeout_s)
        except OSError:
            return None


@dataclass(frozen=True)
class _Guise:
    """What a template is by itself, which none of its children may be."""

    connection: socket.socket
    name: str
    on_ctrl_c: Any

    @classmethod
    def put_on(cls, connection: socket.socket) -> _Guise:
        """Keep nothing of the process that was copied but its memory."""
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) != connection.fileno():
                with suppress(OSError):  # the listing's own
                    os.close(int(name))
        connection.settimeout(IDLE_S)
        # Ctrl-C reaches all processes of a terminal; the one that made the template says when it ends.
        return cls(connection, _rename(NAME), signal.signal(signal.SIGINT, signal.SIG_IGN))

    def take_off(self) -> None:
        self.connection.close()
        _rename(self.name)
        signal.signal(signal.SIGINT, self.on_ctrl_c)


def _serve(connection: socket.socket, kit: _Kit) -> NoReturn:
    try:
        guise = _Guise.put_on(connection)
        for name in kit.imports:
            with suppress(Exception):
                importlib.import_module(name)
        while True:
            data, descriptors, _, _ = socket.recv_fds(connection, _ANSWER_BYTES, MOST_DESCRIPTORS + 8)
            if not data:
                break
            request = json.loads(data)
            become = partial(_become, kit, guise, descriptors, again=request["again"])
            connection.send(json.dumps(_answer(become, request["parent"])).encode())
            for descriptor in descriptors:
                os.close(descriptor)
    finally:
        os._exit(0)


def _rename(name: str) -> str:
    """Give this process, of which ps and top show up to 15 bytes, a name; return the one that it had."""
    with open("/proc/self/comm", "r+", encoding="utf-8", errors="surrogateescape") as file:
        before = file.read().removesuffix("\n")
        file.write(name)
    return before


def _answer(become: Callable[[], NoReturn], parent: int) -> dict[str, int | str]:
    # The sockets here are its own and those that came with the request.
    reason = why_not_here(descriptors=False)
    if reason is not None:
        return {"refused": reason}
    try:
        return {"pid": fork_orphan(become, parent)}
    except (TreeError, OSError) as error:
        return {"refused": str(error)}


def _become(kit: _Kit, guise: _Guise, descriptors: Sequence[int], *, again: bool) -> NoReturn:
    """Be the process that was asked for, from its first statement to its end."""
    code = 1
    try:
        guise.take_off()
        kit.on_birth(kit.again() if again else None)
        source, _, tracker, *given = descriptors
        # As multiprocessing.forkserver does in its children: names of the standard library without another way.
        resource_tracker._resource_tracker._fd = tracker  # type: ignore[attr-defined]
        forkserver._forkserver._inherited_fds = given  # type: ignore[attr-defined]
        surroundings = pickle.loads(receive_message(source))
        assert isinstance(surroundings, Surroundings)
        surroundings.apply()
        if kit.mend is not None:
            kit.mend(kit.environ)
        code = spawn._main(source, os.dup(source))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        _end(code)


def _end(code: int) -> NoReturn:
    """End as an interpreter does: functions that were registered for the exit are called, output is written."""
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
    finally:
        os._exit(code)
