"""Restore and save as engines and commands call them: settings and a job in, an outcome out. Expected failures are
outcomes, not exceptions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

from ...settings import CompileCacheSettings
from ..cache_errors import CacheError, CacheOperationInterrupted, CacheValidationError
from ..compaction import compact
from ..packs.key_packs import for_this_host, read_packs
from ..packs.pack import Pack
from ..packs.scan import LocalFile, scan
from ..retention import Policy, prune
from ..stores.interface import Store
from ..stores.opening import open_store
from ..trust import Trust
from ..verdict.explain import nearest_in_store, note_verdict
from ..verdict.judge import judge
from .job import Job
from .leftovers import clear_leftovers
from .locks import held
from .outcome import Outcome
from .restore import Restore
from .save import factors_of, not_in, save
from .use import noted_uses

_SETTLE_S = 1.0
_LONGEST_SETTLE_S = 20.0
_CLOCK_SLACK_NS = 20_000_000  # a file's times come from a coarser clock than time.time_ns()
SAVE_LOCK = "save"


def perform(job: Job, settings: CompileCacheSettings, may_go_on: Callable[[], bool] = lambda: True) -> Outcome:
    """Carry out a job; failures are in the outcome."""
    began = time.monotonic()
    if not settings.enabled:
        return Outcome("off")
    work = _restore if job.action == "restore" else _save
    outcome = _attempt(partial(work, job, settings, may_go_on), settings)
    outcome.seconds = time.monotonic() - began
    return outcome


def _attempt(work: Callable[[], Outcome], settings: CompileCacheSettings) -> Outcome:
    """The outcome of ``work``, expected failures included."""
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
    outcome = Restore(
        store,
        job.key,
        paths,
        trust,
        layout=job.ranks(),
        threads=threads_of(settings),
        least_free_bytes=int(settings.min_local_free_bytes),
        may_go_on=may_go_on,
    ).run()
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
        packs = for_this_host(read_packs(store, job.key, trust, []), job.key)
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
            # A failing store must not hide the verdict.
            outcome = _attempt(write, settings)
            if not outcome.failed:
                _tidy(store, job, settings, trust, packs, outcome)
        if uses:  # an engine ran; a save by hand has no verdict
            outcome.verdict, outcome.reasons = verdict.result, verdict.reasons
            note_verdict(job.home(), job.key, verdict)
        return outcome


def _tidy(
    store: Store, job: Job, settings: CompileCacheSettings, trust: Trust, packs: list[Pack], outcome: Outcome
) -> None:
    """Compact and prune after a save. A failure here is not a failure of the save."""
    try:
        if len(packs) + 1 > settings.compact_packs:
            compact(store, job.key, trust, level=settings.compression_level, more_than=settings.compact_packs)
        prune(store, policy_of(settings), trust)
    except (OSError, CacheError) as error:
        outcome.notes.append(f"the store could not be tidied up: {error}")


def _is_ours(file: LocalFile, since_ns: int, directories: tuple[str, ...]) -> bool:
    """Whether a file is newer than the engine's start, or lies in a directory that a rank noted as in use."""
    if file.ctime_ns >= since_ns - _CLOCK_SLACK_NS:
        return True
    return any(file.local.startswith(f"{directory.rstrip('/')}/") for directory in directories)


def _settle(job: Job) -> None:
    """Wait until no file was written for a second: the ranks of a node are ready at different times."""
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
