"""Runs a parser on bytes that it should not trust, in a child with limits on memory and CPU time."""

import resource
from collections.abc import Callable
from pathlib import Path

from tests.support.children import in_child

MOST_CPU_S, MOST_BYTES = 10, 256 << 20
"""Far more than any input of a few MB takes; what these tests are about took hours, or gigabytes."""


def within_limits(parse: Callable[[], object], most_bytes: int = MOST_BYTES, most_cpu_s: int = MOST_CPU_S) -> str:
    """What a parser says: the text of its error, or "" if it took the input.

    Raises:
        ChildDied: it took more CPU time or memory than the limits, or raised something that is no error of ours.
    """
    return str(in_child(lambda: _limited(parse, most_bytes, most_cpu_s)))


def _limited(parse: Callable[[], object], most_bytes: int, most_cpu_s: int) -> str:
    from engine_loader.compile_cache.cache_errors import CacheValidationError
    from engine_loader.errors import CheckpointError

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + most_bytes, resource.RLIM_INFINITY))
    seconds = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2])) + most_cpu_s
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    try:
        parse()
    except (CheckpointError, CacheValidationError) as error:
        return str(error)
    return ""
