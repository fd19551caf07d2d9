"""Restores and saves as the functions of b10_transfer do them: at once, waited for, and never with an exception."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from ..compile_cache.cache_errors import CacheError
from ..compile_cache.directories import directories_of, name_private_directories
from ..compile_cache.key import CacheKey
from ..compile_cache.process.job import Job
from ..compile_cache.process.outcome import Outcome
from ..compile_cache.process.session import run_job
from ..compile_cache.space import mib
from ..settings import CompileCacheSettings
from .b10_settings import drop_in_settings

logger = logging.getLogger(__name__)


def run_drop_in(
    action: Literal["restore", "save"], engine: str, key_of: Callable[[CompileCacheSettings], CacheKey]
) -> Outcome:
    """Restore or save the caches of an engine, and log how it went. What goes wrong is in the outcome.

    Args:
        engine: a key of directories.ENGINES.
        key_of: the key of the caches, from the settings.
    """
    try:
        settings = drop_in_settings()
        for line in name_private_directories(engine, lambda: settings.enabled and settings.trust == "owner"):
            logger.warning("compile cache: %s: caches are code", line)
        directories = {name: str(path) for name, path in directories_of(engine).items()}
        job = Job(action, engine, key_of(settings), directories, settings=settings.model_dump(mode="json"))
        outcome = run_job(job, settings.restore_timeout_s if action == "restore" else settings.save_timeout_s)
    except (OSError, CacheError, ValueError) as error:  # SettingsError is a ValueError
        outcome = Outcome("failed", messages=[str(error)])
    for message in outcome.messages:
        logger.warning("compile cache: %s", message)
    if outcome.files:
        logger.info(
            "compile cache: %s %d files, %s, in %.1f s",
            outcome.status,
            outcome.files,
            mib(outcome.bytes),
            outcome.seconds,
        )
    elif outcome.status == "off":
        logger.warning("compile cache: switched off (compile_cache.enabled, BASETEN_FS_ENABLED)")
    elif outcome.status == "nothing" and action == "save":
        logger.warning("compile cache: there is nothing to save in %s", ", ".join(job.directories.values()))
    return outcome
