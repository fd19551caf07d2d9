"""The two operations as engines and commands ask for them: from settings and a job to an outcome, with no exception
that is expected.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ...settings import CompileCacheSettings
from ...sources.registry import is_remote
from ..directories import ENGINES, VLLM_MODEL_INFOS, CacheRoot
from ..errors import CacheError, CacheOperationInterrupted, CacheValidationError
from ..explain import judge, nearest_key, note_verdict
from ..key import CacheKey
from ..packs.pack import Pack, read_manifest
from ..packs.scan import LocalFile, scan
from ..retention import Policy, compact, prune
from ..stores.filesystem import FilesystemStore
from ..stores.store import Store
from ..trust import Trust, load_trust
from .leftovers import clear_leftovers
from .locks import held
from .outcome import Outcome
from .restore import read_packs, restore
from .save import factors_of, not_in, save
from .use import noted_uses

_SETTLE_S = 1.0
_LONGEST_SETTLE_S = 20.0
_CLOCK_SLACK_NS = 20_000_000  # a file's times come from a coarser clock than ours
_MOST_KEYS_COMPARED = 50
SAVE_LOCK = "save"


@dataclass(frozen=True)
class Job:
    """What is to be done, in a form that another process can be given.

    Attributes:
        engine: a key of directories.ENGINES.
        model_infos: only vLLM's descriptions of models, instead of everything else.
        directories: name of a cache -> where it is here.
        since_ns: a save takes files that came after this time (nanoseconds since the epoch), and those in directories
            that the engine noted as in use; 0: all.
        settle: wait until nobody writes into the caches any more.
        background: with the lowest priority.
    """

    action: Literal["restore", "save"]
    engine: str
    key: CacheKey
    directories: Mapping[str, str]
    model_infos: bool = False
    since_ns: int = 0
    settle: bool = False
    background: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"key": self.key.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Job:
        return cls(**{**value, "key": CacheKey.from_json(value["key"])})

    def roots(self) -> tuple[CacheRoot, ...]:
        return (VLLM_MODEL_INFOS,) if self.model_infos else ENGINES[self.engine]

    def paths(self) -> dict[str, Path]:
        names = {root.name for root in self.roots()}
        return {name: Path(path) for name, path in self.directories.items() if name in names}

    def home(self) -> Path:
        """The cache whose state directory holds the locks."""
        return next(iter(self.paths().values()))


def open_store(settings: CompileCacheSettings) -> tuple[Store, Trust]:
    """The store of the settings.

    Raises:
        CacheValidationError: the key file is not what it should be, or the store is one of objects and cannot be had.
    """
    trust = load_trust(settings.key_file, anyone=settings.trust == "anyone")
    if is_remote(settings.directory):
        from ..stores.objects import ObjectCacheStore

        return ObjectCacheStore(settings.directory, trust, settings.work_directory), trust
    return FilesystemStore(settings.directory, trust, int(settings.min_store_free_bytes)), trust


def perform(job: Job, settings: CompileCacheSettings, may_go_on: Callable[[], bool] = lambda: True) -> Outcome:
    """Do it; whatever fails is in the outcome."""
    began = time.monotonic()
    if not settings.enabled:
        return Outcome("off")
    work = _restore if job.action == "restore" else _save
    outcome = _attempt(partial(work, job, settings, may_go_on), settings)
    outcome.seconds = time.monotonic() - began
    return outcome


def _attempt(work: Callable[[], Outcome], settings: CompileCacheSettings) -> Outcome:
    """What comes of ``work``, expected failures included."""
    try:
        return work()
    except CacheOperationInterrupted as error:
        return Outcome("interrupted", messages=[str(error)])
    except CacheValidationError as error:
        return Outcome("refused", messages=[str(error)])
    except CacheError as error:
        return Outcome("failed", messages=[str(error)])
    except OSError as error:
        return Outcome("failed", messages=[f"{error}; is the store {settings.directory} in place and writable?"])


def threads_of(settings: CompileCacheSettings) -> int:
    """How many threads compress and decompress."""
    return settings.threads or min(len(os.sched_getaffinity(0)), 32)


def policy_of(settings: CompileCacheSettings) -> Policy:
    """What pruning keeps."""
    return Policy(settings.keep_days, settings.keep_keys, int(settings.keep_bytes), settings.unfinished_timeout_s)


def _restore(job: Job, settings: CompileCacheSettings, may_go_on: Callable[[], bool]) -> Outcome:
    store, trust = open_store(settings)
    paths = job.paths()
    for directory in paths.values():
        clear_leftovers(directory, settings.unfinished_timeout_s)
    outcome = restore(
        store,
        job.key,
        paths,
        trust,
        threads=threads_of(settings),
        least_free_bytes=int(settings.min_local_free_bytes),
        may_go_on=may_go_on,
    )
    if outcome.in_place and not settings.read_only:
        for stored in store.list(job.key.prefix):
            store.mark_used(stored.name)
    elif outcome.status == "nothing":
        outcome.notes += nearest_in_store(store, job.key, trust)
    return outcome


def _save(job: Job, settings: CompileCacheSettings, may_go_on: Callable[[], bool]) -> Outcome:
    with held(job.home(), SAVE_LOCK, settings.lock_timeout_s) as alone:
        if not alone:
            return Outcome("nothing", notes=["another process of this node saves"])
        if job.settle:
            _settle(job)
        uses = noted_uses(job.home(), job.since_ns - _CLOCK_SLACK_NS) if job.since_ns else []
        directories = tuple(directory for use in uses for directory in use.directories)
        files = [file for file in scan(job.roots(), job.paths()) if _is_ours(file, job.since_ns, directories)]
        store, trust = open_store(settings)
        packs = read_packs(store, job.key, trust, [])
        new = not_in(packs, files)
        factors = factors_of(new) | {use.factors_path: use.factors for use in uses}
        verdict = judge(packs, new, factors)
        if settings.read_only:
            outcome = Outcome("nothing", notes=["the store is not written to (compile_cache.read_only)"])
        elif _too_many_saves(store, settings):
            outcome = Outcome(
                "nothing", messages=[f"{settings.max_concurrent_saves} other saves are under way; passed over"]
            )
        else:
            write = partial(
                save,
                store,
                job.key,
                job.paths(),
                files,
                trust,
                factors=factors,
                threads=threads_of(settings),
                level=settings.compression_level,
                most_bytes=int(settings.max_pack_bytes),
            )
            # A store that fails is no reason to keep what the cache was good for to oneself.
            outcome = _attempt(write, settings)
            if not outcome.failed:
                _tidy(store, job, settings, trust, packs, outcome)
        if uses:  # an engine ran; whoever saves by hand asks no such question
            outcome.verdict, outcome.reasons = verdict.result, verdict.reasons
            note_verdict(job.home(), job.key, verdict)
        return outcome


def _tidy(
    store: Store, job: Job, settings: CompileCacheSettings, trust: Trust, packs: list[Pack], outcome: Outcome
) -> None:
    """What a saver does for the store while it is there. Failing at it is no failure of the save."""
    try:
        if len(packs) + 1 > settings.compact_packs:
            compact(store, job.key, trust, level=settings.compression_level, more_than=settings.compact_packs)
        prune(store, policy_of(settings), trust)
    except (OSError, CacheError) as error:
        outcome.notes.append(f"the store could not be tidied up: {error}")


def _is_ours(file: LocalFile, since_ns: int, directories: tuple[str, ...]) -> bool:
    """Whether it came since the engine started, or lies where the engine said that it uses it."""
    if file.ctime_ns >= since_ns - _CLOCK_SLACK_NS:
        return True
    return any(file.local.startswith(f"{directory.rstrip('/')}/") for directory in directories)


def _settle(job: Job) -> None:
    """Wait until nothing was written for a second: the ranks of a node are not ready at the same instant."""
    deadline = time.monotonic() + _LONGEST_SETTLE_S
    while time.monotonic() < deadline:
        latest = max((file.ctime_ns for file in scan(job.roots(), job.paths())), default=0)
        quiet_s = time.time() - latest / 1e9
        if quiet_s >= _SETTLE_S:
            return
        time.sleep(max(_SETTLE_S - quiet_s, 0.1))


def _too_many_saves(store: Store, settings: CompileCacheSettings) -> bool:
    now = time.time()
    under_way = [item for item in store.unfinished() if now - item.modified < settings.unfinished_timeout_s]
    return len(under_way) >= settings.max_concurrent_saves


def nearest_in_store(store: Store, key: CacheKey, trust: Trust) -> list[str]:
    """How ``key`` differs from the nearest one that has packs: a line for each part."""
    others: dict[str, CacheKey] = {}
    for stored in sorted(store.list(), key=lambda item: item.modified, reverse=True):
        if stored.key_prefix in others or len(others) >= _MOST_KEYS_COMPARED:
            continue
        try:
            others[stored.key_prefix] = read_manifest(store, stored, stored.key_prefix, trust).manifest.key
        except (OSError, CacheValidationError):
            continue
    names = {name for name, _ in key.parts}
    alike = [other for other in others.values() if len(names & {name for name, _ in other.parts}) * 2 > len(names)]
    return nearest_key(key, alike)
