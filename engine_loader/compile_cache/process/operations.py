"""Restore and save as engines and commands call them: settings and a job in, an outcome out. Expected failures are
outcomes, not exceptions.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from ...settings import CompileCacheSettings
from ..cache_errors import CacheError, CacheOperationInterrupted, CacheValidationError
from ..directories import STATE
from ..ownership import Access
from ..packs.key_packs import files_for, for_this_host, read_key
from ..packs.scan import LocalFile, scan
from ..packs.verify import damaged_frames
from ..store_reads import joined_reads
from ..stores.interface import Store
from ..stores.opening import open_store
from ..stores.uses import note_used
from ..trust import CANNOT_SIGN, Trust
from ..upkeep.damage import note_damage, noted_damage
from ..upkeep.suspects import clear_suspects, note_suspects, suspects
from ..verdict.compiled import piece_of
from ..verdict.explain import nearest_in_store, note_verdict
from ..verdict.judge import judge
from .job import Job
from .leftovers import clear_leftovers
from .locks import held
from .outcome import Outcome
from .restore import Restore
from .save import Save, SaveOptions, factors_of, not_in
from .tidy import tidy
from .trials import Trial, begin_trial, failed_trials, others_start
from .use import Use, left_alone, note_restore, noted_uses

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


def _restore(job: Job, settings: CompileCacheSettings, may_go_on: Callable[[], bool]) -> Outcome:
    paths = job.paths()
    for directory in paths.values():
        clear_leftovers(directory, settings.unfinished_timeout_s)
    suspicion = _after_crashes(job, settings) if job.engine_pid else []
    if suspicion:
        return Outcome("suspect", messages=suspicion)
    store, trust = open_store(settings, job.home() / STATE)
    trial = begin_trial(job.home(), job.key.prefix, job.engine_pid, job.since_ns)
    restore = Restore(
        store,
        job.key,
        paths,
        trust,
        layout=job.ranks(),
        threads=threads_of(settings),
        least_free_bytes=int(settings.min_local_free_bytes),
        may_go_on=may_go_on,
        before_move=trial.add if job.engine_pid else lambda _: None,
        access=Access(settings.trust == "anyone"),
    )
    outcome = restore.run()
    outcome.reads = joined_reads(store.reads, {entry.name: () for entry in restore.entries if entry.kind == "pack"})
    if restore.left_alone and job.since_ns:
        note_restore(job.home(), job.since_ns, restore.left_alone)
    outcome.messages += trust.warnings
    with suppress(OSError):  # the save behind it then relies on manifests alone
        note_damage(job.home(), store.description, restore.refused.frames)
    if outcome.in_place:  # also where nothing is saved: else a key that such machines use would be pruned
        outcome.messages += suspects(store, restore.entries, restore.packs)
        note_used(store, job.key.prefix)
    return outcome


def _after_crashes(job: Job, settings: CompileCacheSettings) -> list[str]:
    """Set aside what was restored for engines that ended before they were ready; a line for each of this key, for
    which nothing is to be restored now.
    """
    lines = []
    for trial in failed_trials(job.home()):
        count = trial.set_aside(job.paths())
        trial.clear()
        told = "" if settings.read_only else _told_others(settings, trial)
        if trial.key == job.key.prefix:
            lines.append(
                f"the last engine here ended before it was ready, after a restore of {', '.join(trial.packs)}: this "
                f"start goes without a restore, and the {count} files that it brought were moved to "
                f"{job.home() / STATE}{told}; if an engine ends again with these packs: "
                "`engine-loader compile-cache quarantine PACK`"
            )
    return lines


def _told_others(settings: CompileCacheSettings, trial: Trial) -> str:
    """Note the packs of a failed trial in the store; what there is to say of it."""
    try:
        note_suspects(open_store(settings)[0], trial.packs)
    except (OSError, CacheError) as error:
        return f" (the store could not be told: {error})"
    return ", and the store has a note that warns other nodes"


def _save(job: Job, settings: CompileCacheSettings, may_go_on: Callable[[], bool]) -> Outcome:
    with held(job.home(), SAVE_LOCK, settings.lock_timeout_s) as alone:
        if not alone:
            return Outcome("nothing", notes=["another process of this node saves"])
        if job.settle:
            _settle(job)
        noted = noted_uses(job.home(), job.since_ns - _CLOCK_SLACK_NS) if job.since_ns else []
        uses = [use for use in noted if use.is_of(job.since_ns, job.key.scope)]
        messages: list[str] = []
        anyone = settings.trust == "anyone"
        files = _files_of_engine(job, noted, scan(job.roots(), job.paths(), messages, anyone=anyone))
        store, trust = open_store(settings, job.home() / STATE)
        found = read_key(store, job.key.prefix, trust)
        damaged = damaged_frames(store, found.packs, noted_damage(job.home(), store.description))
        packs = for_this_host(found.packs, job.key)
        refused = left_alone(job.home(), job.since_ns) if job.since_ns else []
        if refused:  # the engine compiled anew what the store has: no pack more at each of its starts
            held_already = files_for(packs, without=damaged).keys()
            files = [file for file in files if file.path not in held_already]
        new = not_in(packs, files, job.paths(), damaged=damaged)
        factors = factors_of(new) | {use.factors_path: use.factors for use in uses}
        verdict = judge(packs, new, factors, refused)
        if settings.read_only:
            outcome = Outcome("nothing", notes=["the store is not written to (compile_cache.read_only)"])
        elif not trust.can_sign:
            outcome = Outcome("nothing", messages=[CANNOT_SIGN])
        else:
            saving = Save(store, job.key, job.paths(), files, trust, _save_options(settings), factors, damaged)
            # A failing store must not hide the verdict.
            outcome = _attempt(partial(saving.run, found), settings)
            if saving.passed_over:
                outcome.messages.append(f"{settings.max_concurrent_saves} other saves are under way; passed over")
            elif not outcome.failed:
                tidy(store, job.key, settings, trust, outcome)
        outcome.messages += messages
        if uses:  # an engine ran; a save by hand has no verdict
            outcome.verdict, outcome.reasons = verdict.result, verdict.reasons
            if not packs:
                outcome.reasons = outcome.reasons + _nearest(store, job, trust)
            note_verdict(job.home(), job.key, verdict)
            if verdict.result == "hit" and not settings.read_only:
                with suppress(OSError):  # the next hit deletes them
                    clear_suspects(store, store.entries(job.key.prefix), packs)
        return outcome


def _save_options(settings: CompileCacheSettings) -> SaveOptions:
    return SaveOptions(
        threads=threads_of(settings),
        level=settings.compression_level,
        most_bytes=int(settings.max_pack_bytes),
        wait_s=settings.save_timeout_s / 3,
        most_at_once=settings.max_concurrent_saves,
        unfinished_s=settings.unfinished_timeout_s,
    )


def _nearest(store: Store, job: Job, trust: Trust) -> list[str]:
    """How the key differs from the nearest that has packs. The engine does not wait for this any more."""
    try:
        return nearest_in_store(store, job.key, trust)
    except (OSError, CacheError):
        return []


def _files_of_engine(job: Job, noted: list[Use], files: list[LocalFile]) -> list[LocalFile]:
    """The files that an engine's start made, or used.

    Those are newer than the start, or lie in a directory that a rank noted as in use; but what another engine of this
    node noted is that one's, and so is what belongs to a whole model and to no note, while another engine starts.
    """
    if not job.since_ns:
        return files
    ours = _below(use.directories for use in noted if use.is_like(job.key.scope))
    theirs = _below(use.directories for use in noted_uses(job.home()) if not use.is_like(job.key.scope))
    not_alone = others_start(job.home(), job.since_ns)

    def is_ours(file: LocalFile) -> bool:
        if file.local.startswith(ours):
            return True
        if file.ctime_ns < job.since_ns - _CLOCK_SLACK_NS or file.local.startswith(theirs):
            return False
        piece = piece_of(file.path) if not_alone else None
        return piece is None or not piece.compiler.whole

    return [file for file in files if is_ours(file)]


def _below(directories: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(f"{directory.rstrip('/')}/" for some in directories for directory in some)


def _settle(job: Job) -> None:
    """Wait until no file was written for a second: the ranks of a node are ready at different times."""
    deadline = time.monotonic() + _LONGEST_SETTLE_S
    while time.monotonic() < deadline:
        latest = max((file.ctime_ns for file in scan(job.roots(), job.paths())), default=0)
        quiet_s = time.time() - latest / 1e9
        if quiet_s >= _SETTLE_S:
            return
        time.sleep(max(_SETTLE_S - quiet_s, 0.1))
