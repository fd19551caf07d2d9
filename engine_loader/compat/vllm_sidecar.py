"""b10_transfer's command ``b10-compile-cache``: restores vLLM's caches, waits until vLLM answers, and saves them.

With this package in vLLM's environment, vLLM does both itself, and the command finds nothing to do.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Self

from ..compile_cache.directories import directories_of
from ..compile_cache.host.versions import module_version
from ..compile_cache.key import CacheKey, environment_key
from ..compile_cache.verdict.explain import last_key
from ..settings import CompileCacheSettings
from .b10_jobs import run_drop_in

logger = logging.getLogger(__name__)

_ENGINE = "vllm"
_SCOPE = "all"
_ANSWER_S = 5.0
_BAD_VARIABLE, _NOT_READY = 1, 2


@dataclass(frozen=True)
class Waiting:
    """How vLLM is waited for.

    Attributes:
        url: answers a GET by 200 when vLLM is ready.
        timeout_s: seconds after which the command gives up.
        interval_s: seconds between two requests.
        level: of the log.
    """

    url: str
    timeout_s: float
    interval_s: float
    level: str

    @classmethod
    def of_environment(cls) -> Self:
        """From B10_TRANSFER_VLLM_URL, B10_TRANSFER_TIMEOUT_S, B10_TRANSFER_INTERVAL_S and B10_TRANSFER_CLI_LOGLEVEL.

        Raises:
            ValueError: a time is no number.
        """
        return cls(
            os.environ.get("B10_TRANSFER_VLLM_URL") or "http://127.0.0.1:8000/v1/models",
            float(os.environ.get("B10_TRANSFER_TIMEOUT_S") or 1800),
            float(os.environ.get("B10_TRANSFER_INTERVAL_S") or 2),
            (os.environ.get("B10_TRANSFER_CLI_LOGLEVEL") or "INFO").upper(),
        )


def save_vllm_compile_cache() -> None:
    """Restore vLLM's caches; where the store had none, wait until vLLM is ready, and save what it compiled.

    Raises:
        SystemExit: with status 1 where a B10_TRANSFER_ variable is wrong, 2 where vLLM did not become ready in time.
            What goes wrong with the store is logged, and no exception.
    """
    try:
        waiting = Waiting.of_environment()
        logging.basicConfig(level=waiting.level, format="%(asctime)s | %(levelname)s | %(message)s")
    except ValueError as error:
        logger.error("a variable B10_TRANSFER_… is wrong: %s", error)
        sys.exit(_BAD_VARIABLE)
    if run_drop_in("restore", _ENGINE, _key).status == "restored":
        return
    if not _wait(waiting):
        logger.error("%s did not answer with 200 in %g s (B10_TRANSFER_TIMEOUT_S)", waiting.url, waiting.timeout_s)
        sys.exit(_NOT_READY)
    run_drop_in("save", _ENGINE, _key)


def _key(settings: CompileCacheSettings) -> CacheKey:
    """That of the engine that ran last here, so that nothing is stored twice; else one for all models."""
    last = last_key(next(iter(directories_of(_ENGINE).values())))
    if last is not None and settings.scope in (None, last.scope):
        return last
    return environment_key({_ENGINE: module_version(_ENGINE)}, settings.scope or _SCOPE)


def _wait(waiting: Waiting) -> bool:
    logger.info("waiting for vLLM at %s, at most %g s", waiting.url, waiting.timeout_s)
    end = time.monotonic() + waiting.timeout_s
    while not _answers(waiting.url):
        if time.monotonic() > end:
            return False
        time.sleep(waiting.interval_s)
    return True


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_S) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError, ValueError) as error:
        logger.debug("%s: %s", url, error)
        return False
