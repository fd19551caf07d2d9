"""The compile cache's hooks, the part that all engines share: one restore and one save for an engine on a node.

The process that starts the others of its node begins the restore, and those that compile wait for it. Nothing here
waits for longer than compile_cache.restore_timeout_s; ``quietly`` turns exceptions into warnings.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...compile_cache.directories import STATE, directories_of, name_private_directories
from ...compile_cache.host.hashes import short_hash
from ...compile_cache.key import CacheKey
from ...compile_cache.process.job import Job
from ...compile_cache.process.locks import NodeLock, held
from ...compile_cache.process.outcome import Outcome
from ...compile_cache.process.session import Running, log_restore, log_save
from ...compile_cache.process.trials import end_trial, engine_lock
from ...compile_cache.process.use import NOTES, noted_uses
from ...escaping import printable
from ...report.events import LOCK, recorder
from ...report.phases import RESTORE_WAIT
from ...settings import CompileCacheSettings, load_settings
from .start.restored_last import note_restored

RESTORE_LOCK = "restore"
SAVE_LOCK = "save-of-node"
STARTED = "_ENGINE_LOADER_CACHE_STARTED"
"""Environment variable for the workers: the restore that a process of their node began (``Begun``), as JSON.

Not a setting: those begin with ENGINE_LOADER_. vLLM's executor of Ray gives all variables of the engine's process to
workers on all nodes (vllm/v1/executor/ray_executor_v2.py, get_driver_env_vars), this one among them.
"""
_SAVES_IN_FOREGROUND = "_ENGINE_LOADER_SAVES_IN_FOREGROUND"
_SLACK_S = 5.0
_WORTH_A_LINE_S = 0.1


@dataclass(frozen=True)
class Begun:
    """The restore of an engine on this node.

    Attributes:
        since_ns: when it began (nanoseconds since the epoch).
        key: what was restored is of it, and what is compiled is saved under it. A worker that is bound to some of the
            node's processors would find another number of threads, and so another key.
    """

    since_ns: int
    key: CacheKey


class NodeSession:
    """The restore and the save of one engine on one node.

    Args:
        engine: a key of directories.ENGINES.
        key: the engine's key in the compile cache.
        settings: those of the compile cache.
        log: the engine's logger.
        layout: sizes of its parallelism, as compile_cache.unpacking.rank_sets.Layout takes them.
        on_trial: what is restored is on trial until the engine is ready, which ``save`` or ``start_save`` tells.
            False where no hook would tell it.
    """

    def __init__(
        self,
        engine: str,
        key: CacheKey,
        settings: CompileCacheSettings,
        log: logging.Logger,
        layout: Mapping[str, int],
        *,
        on_trial: bool = True,
    ) -> None:
        self.engine = engine
        self.key = key
        self.settings = settings
        self.since_ns = time.time_ns()
        self._log = log
        self._directories = cache_directories(engine)
        pid = os.getpid() if on_trial else 0
        job = Job("restore", engine, key, self._directories, since_ns=self.since_ns, engine_pid=pid, layout=layout)
        self._starting = engine_lock(job.home(), self.since_ns)
        if on_trial:
            self._starting.acquire(0)
        # Taken before there are workers, so that they find it taken. Another engine of this node may have it already.
        lock = NodeLock(job.home(), RESTORE_LOCK)
        self._lock_path = str(lock.path)
        self._running = Running(
            job,
            settings,
            settings.restore_timeout_s,
            then=functools.partial(_restored, log, job, settings),
            lock=lock,
        )
        node = _node(_home(self._directories))
        os.environ[STARTED] = json.dumps({"since_ns": self.since_ns, "key": key.to_json(), "node": node})

    @property
    def begun(self) -> Begun:
        return Begun(self.since_ns, self.key)

    def wait(self) -> None:
        """Return when the restore has ended, or when the time for it is over, which is logged as a warning."""
        with recorder.span(RESTORE_WAIT, watched={LOCK: self._lock_path}):
            outcome = self._running.result(_time_left(self.settings, self.since_ns))
        if outcome is None:
            self._log.warning("compile cache: the restore does not end; this engine starts without it")

    def stopped(self) -> None:
        """The engine was told to end before it was ready: that says nothing of the cache."""
        end_trial(_home(self._directories), self.since_ns)
        self._starting.release()

    def save(self) -> None:
        """The engine is ready: start to save, in the background, what was compiled since the restore began."""
        start_save(self.engine, self.key, self.settings, self.since_ns, self._log)
        self._starting.release()


def _restored(log: logging.Logger, job: Job, settings: CompileCacheSettings, outcome: Outcome) -> None:
    log_restore(log, job, settings.directory, outcome)
    note_restored(outcome, settings)


def scope_of(settings: CompileCacheSettings, model: str, revision: str | None, sizes: Mapping[str, int]) -> str:
    """The scope of an engine's key: the setting ``scope``, or the model and the parallel layout.

    Args:
        settings: those of the compile cache.
        model: path or name of the model.
        revision: the model's revision.
        sizes: kind of parallelism -> number of ranks.
    """
    if settings.scope is not None:
        return settings.scope
    layout = "_".join(f"{name}{size}" for name, size in sizes.items())
    return f"{Path(model).name[:60]}_{short_hash(model, str(revision or ''))}_{layout}"


def start_save(engine: str, key: CacheKey, settings: CompileCacheSettings, since_ns: int, log: logging.Logger) -> None:
    """Start a save in the background, with the lowest priority; to be called when an engine is ready, and by no
    other. It also settles the verdict of the restore. After ``save_in_foreground`` it returns when the save has ended.
    """
    directories = cache_directories(engine)
    end_trial(_home(directories), since_ns)
    job = Job("save", engine, key, directories, since_ns=since_ns, settle=True, background=True)
    save = Running(
        job, settings, settings.save_timeout_s, then=functools.partial(log_save, log, job, settings.directory)
    )
    await_in_foreground(save, settings)


def save_in_foreground() -> None:
    """Have saves of this process, and of those that it starts from now on, hold up the engine until they end.

    For engines whose processes are captured as they are: a save that goes on would be a part of the image, with its
    connections.
    """
    os.environ[_SAVES_IN_FOREGROUND] = "1"


def await_in_foreground(save: Running, settings: CompileCacheSettings) -> None:
    """Return when ``save`` has ended, if saves hold up the engine; else at once."""
    if os.environ.get(_SAVES_IN_FOREGROUND):
        save.result(settings.save_timeout_s + _SLACK_S)


def start_save_of_node(
    engine: str, begun: Begun, settings: CompileCacheSettings, ranks: int, log: logging.Logger
) -> None:
    """Start the save of a node on which no process sees that the engine is ready: the last of its ranks does, once.

    To be called by each of the node's ``ranks`` ranks when it has warmed up and left its note (``note_use``).
    """
    home = _home(cache_directories(engine))
    if sum(use.engine == begun.since_ns for use in noted_uses(home)) < ranks:
        return
    told = home / STATE / NOTES / "saved"
    with held(home, SAVE_LOCK, _SLACK_S):
        if told.exists() and told.read_text() == str(begun.since_ns):
            return
        told.write_text(str(begun.since_ns))
    start_save(engine, begun.key, settings, begun.since_ns, log)


def wait_for_node(engine: str, settings: CompileCacheSettings, began_ns: int) -> None:
    """Return when no process of this node restores, or when the time for the restore is over."""
    lock = NodeLock(next(iter(directories_of(engine).values())), RESTORE_LOCK)
    with recorder.span(RESTORE_WAIT, watched={LOCK: str(lock.path)}):
        if lock.acquire(_time_left(settings, began_ns), shared=True):
            lock.release()


def restore_begun(engine: str) -> Begun | None:
    """The engine's restore that this process or one above it began on this node; None if none did."""
    try:
        value = json.loads(os.environ.get(STARTED, "{}"))
        if value.get("node") != _node(_home(cache_directories(engine))):
            return None
        return Begun(int(value["since_ns"]), CacheKey.from_json(value["key"]))
    except (AttributeError, KeyError, TypeError, ValueError):  # of another version of this package
        return None


def _node(home: Path) -> str:
    """What tells nodes apart: machines by their names, containers of one machine by where they keep the cache."""
    return short_hash(socket.gethostname(), str(home))


def cache_settings() -> CompileCacheSettings:
    """The settings of the compile cache, read anew.

    Raises:
        SettingsError: a value is wrong, or a key unknown.
    """
    return load_settings().settings.compile_cache


def use_private_directories(engine: str, log: logging.Logger) -> None:
    """Have the engine use directories of this user's own in place of caches that others may write; to be called before
    it looks where its caches are. Never raises.
    """

    def make() -> bool:
        settings = cache_settings()
        return settings.enabled and settings.trust == "owner"

    for line in quietly(log, name_private_directories, engine, make) or ():
        log.warning("compile cache: %s: caches are code", line)


def cache_directories(engine: str) -> dict[str, str]:
    """Name of a cache directory of the engine -> its path on this node, as a job takes them."""
    return {name: str(path) for name, path in directories_of(engine).items()}


def _home(directories: Mapping[str, str]) -> Path:
    """The cache whose state directory holds the marker of a trial."""
    return Path(next(iter(directories.values())))


@contextmanager
def watched(session: NodeSession | None, log: logging.Logger) -> Iterator[None]:
    """A part of an engine's start. That the engine is told to stop within is not held against what was restored."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if session is not None:
            quietly(log, session.stopped)
        raise


def quietly(log: logging.Logger, action: Callable[..., Any], *args: Any) -> Any:
    """Return what ``action`` returns; None if it raises, which is logged as a warning."""
    try:
        return action(*args)
    except Exception as error:
        log.warning(
            "compile cache: %s: %s; the engine goes on without it "
            "(switch it off: ENGINE_LOADER_COMPILE_CACHE__ENABLED=false)",
            type(error).__name__,
            printable("; ".join(str(error).splitlines())),
            exc_info=log.isEnabledFor(logging.DEBUG),
        )
        return None


def _time_left(settings: CompileCacheSettings, began_ns: int) -> float:
    """Seconds that are left of the time for a restore."""
    return max(0.0, settings.restore_timeout_s + _SLACK_S - (time.time_ns() - began_ns) / 1e9)


def tell_wait(log: logging.Logger, wait: Callable[[], object]) -> None:
    """Call ``wait``, which waits for a restore, and log for how long it did, if that was worth a line."""
    began = time.monotonic()
    wait()
    seconds = time.monotonic() - began
    if seconds >= _WORTH_A_LINE_S:
        log.info("compile cache: this start waited %.1f s for the restore", seconds)
