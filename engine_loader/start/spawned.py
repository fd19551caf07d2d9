"""Processes that multiprocessing would spawn, had from a template instead.

The class that starts a ``SpawnProcess`` is exchanged, and nothing of an engine: its contexts, its pipes and locks, and
what is pickled for a child are those of ``spawn``. A process that the template does not make is spawned as before.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import context, popen_fork, reduction, resource_tracker, spawn, util
from multiprocessing.popen_forkserver import _DupFd
from multiprocessing.process import BaseProcess
from typing import Any

from .fitness import why_not_here, why_not_started_so
from .handover import Mend, Surroundings, send_message
from .template import NoTemplateError, Template


@dataclass(frozen=True)
class Role:
    """What a process is for.

    Attributes:
        makes_others: whether it will start processes that have a role, too.
    """

    makes_others: bool


@dataclass(frozen=True)
class Plan:
    """What an engine's adapter knows of the engine's processes.

    Attributes:
        role_of: a process's part in the start; None: it is none that a template is for.
        why_not: (environment of the imports, that of the child) -> a reason against it, or None.
        imports: modules that such processes need beside what the first process has imported.
        mend: gives constants that were computed in another environment their values for this one.
        log: the engine's logger.
    """

    role_of: Callable[[BaseProcess], Role | None]
    why_not: Callable[[Mapping[str, str], Mapping[str, str]], str | None]
    imports: tuple[str, ...]
    mend: Mend
    log: logging.Logger | logging.LoggerAdapter[Any]


class _Current:
    """Of this process: the plan of its engine, and the template that it may ask."""

    plan: Plan | None = None
    template: Template | None = None


def begin(plan: Plan) -> str | None:
    """Make this process's template, and have processes that it spawns come from there.

    Args:
        plan: for the engine of this process. What this process has imported until now may have read its environment;
            what an import itself has set there, it sets in a spawned process, too.

    Returns:
        The reason why there is none; None where there is one.
    """
    reason = why_not_here()
    if reason is not None:
        return reason
    _Current.plan = plan
    context.SpawnProcess._Popen = staticmethod(_start)  # type: ignore[assignment]
    try:
        _Current.template = Template.make(dict(os.environ), imports=plan.imports, mend=plan.mend, on_birth=_born)
    except OSError as error:
        return f"no process could be forked ({error.strerror})"
    return None


def end() -> None:
    """Give the template up: processes are spawned from now on."""
    if _Current.template is not None:
        _Current.template.close()
        _Current.template = None


def _born(template: Template | None) -> None:
    _Current.template = template


def _start(process: BaseProcess) -> Any:
    plan, template = _Current.plan, _Current.template
    role = None if plan is None or template is None else plan.role_of(process)
    if role is None or plan is None or template is None:
        return _spawn(process)
    reason = why_not_started_so() or plan.why_not(template.environ, os.environ)
    if reason is None:
        try:
            return _Forked(process, template, role)
        except NoTemplateError as error:
            reason = str(error)
    plan.log.info("start.template: %s is spawned, not forked: %s", process.name, reason)
    return _spawn(process)


_spawn = context.SpawnProcess._Popen


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class _Forked(popen_fork.Popen):
    """A child that a template has forked. As ``multiprocessing.popen_spawn_posix.Popen``, whose interface it has."""

    method = "spawn"
    DupFd = _DupFd

    def __init__(self, process: BaseProcess, template: Template, role: Role) -> None:
        self._fds: list[int] = []
        self._template, self._role = template, role
        super().__init__(process)

    def duplicate_for_child(self, fd: int) -> int:
        self._fds.append(fd)
        return len(self._fds) - 1

    def _launch(self, process: BaseProcess) -> None:
        content = io.BytesIO()
        context.set_spawning_popen(self)  # type: ignore[arg-type]
        try:
            reduction.dump(spawn.get_preparation_data(process.name), content)
            reduction.dump(process, content)
        finally:
            context.set_spawning_popen(None)
        alive, childs_alive = os.pipe()
        childs_source, source = os.pipe()
        try:
            tracker = resource_tracker.getfd()
            assert tracker is not None
            self.pid = self._template.fork(
                [childs_source, childs_alive, tracker, *self._fds], again=self._role.makes_others
            )
        except BaseException:
            os.close(alive)
            os.close(source)
            raise
        finally:
            os.close(childs_alive)
            os.close(childs_source)
        self.sentinel = alive
        self.finalizer = util.Finalize(self, _close, (source, alive))
        try:
            send_message(source, pickle.dumps(Surroundings()))
            with open(source, "wb", closefd=False) as pipe:
                pipe.write(content.getbuffer())
        except BrokenPipeError:  # the child has ended already; that is seen by its exit status
            pass
