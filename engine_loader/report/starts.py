"""The directories of starts: one for each start of an engine on a node, the last few kept.

A directory holds the events of the start's processes (events.py), and ``summary.json`` once the engine is ready. It is
for this user alone, and the names of models are the most that it tells.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import EngineLoaderError
from ..home import home_expanded
from ..settings import ReportSettings
from .events import OFF, START, recorder

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
_NAME = re.compile(r"\d{8}T\d{6}Z-\d+")
_NEVER_REMOVED_S = 900.0  # of several engines that start at once on a node, none removes another's


class ReportError(EngineLoaderError):
    """There is no start to report on, or its events cannot be read."""


@dataclass(frozen=True)
class Identity:
    """What is started: starts with equal identities are compared with one another.

    Attributes:
        engine: "vllm" or "sglang".
        model: the last part of the model's path or name.
        key: a hash of the model's whole path, of the parallel layout and of the load format.
        layout: e.g. "tp2_pp1_dp1".
        load_format: e.g. "b10_3fs".
    """

    engine: str
    model: str
    key: str
    layout: str
    load_format: str


@dataclass(frozen=True)
class Summary:
    """One start that became ready, in a few words.

    Attributes:
        seconds: from exec to ready.
        ready_wall: when it was ready (seconds since the epoch).
        identity: what was started.
        cache: the status of the compile cache's restore ("restored", "nothing", …); "" where there was none.
    """

    seconds: float
    ready_wall: float
    identity: Identity
    cache: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Summary:
        return cls(**{**value, "identity": Identity(**value["identity"])})


def identity_of(engine: str, model: str, load_format: str, sizes: Mapping[str, int]) -> Identity:
    """The identity of a start; ``sizes``: kind of parallelism -> number of ranks."""
    layout = "_".join(f"{name}{size}" for name, size in sizes.items())
    key = hashlib.sha256("\0".join((engine, model, load_format, layout)).encode()).hexdigest()[:16]
    # What stands before the last slash may be a path of the user's, and behind a question mark a signature.
    name = model.partition("?")[0].rstrip("/").rpartition("/")[2]
    return Identity(engine, name, key, layout, load_format)


def begin_start(settings: ReportSettings, identity: Identity) -> Path | None:
    """Make the directory of a start and write this process's events to it.

    Does nothing in a process that a start has begun already, and never raises: without a directory there are no events.

    Returns:
        The new directory; None where there is none.
    """
    inherited = os.environ.get(START, "")
    if not settings.events:
        recorder.switch_off()
    elif inherited != OFF and not (os.path.isdir(inherited) and not recorder.ready):
        try:
            root = home_expanded(settings.directory)
            directory = root / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}"
            _make_own(directory)
            _remove_old(root, settings.keep_starts)
        except OSError as error:
            logger.debug("no events of this start are written: %s", error)
            recorder.switch_off()
        else:
            recorder.write_to(str(directory))
            recorder.point("start", **asdict(identity))
            return directory
    return None


def starts_in(directory: str | os.PathLike[str]) -> list[Path]:
    """The directories of starts, the oldest first; none where ``directory`` does not exist."""
    root = home_expanded(directory)
    with suppress(OSError):
        return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
    return []


def find_start(name: str, directory: str | os.PathLike[str]) -> Path:
    """The directory of the start that is meant by "latest", by a path, or by a name within ``directory``.

    Raises:
        ReportError: there is none.
    """
    known = starts_in(directory)
    if name == "latest":
        if not known:
            raise ReportError(
                f"there is no start in {directory} yet: one is recorded whenever vLLM or SGLang starts with this "
                "package installed (report.events)"
            )
        return known[-1]
    for path in (Path(name), home_expanded(directory) / name):
        if path.is_dir():
            return path
    names = ", ".join(path.name for path in known) or "none"
    raise ReportError(f"there is no start {name}; in {directory} there are: {names}")


def write_summary(directory: Path, summary: Summary) -> None:
    """Leave what later starts need to know of this one.

    Raises:
        OSError: it cannot be written.
    """
    beside = directory / f".{SUMMARY}"
    beside.write_text(json.dumps(asdict(summary)))
    beside.replace(directory / SUMMARY)


def read_summaries(directory: str | os.PathLike[str]) -> list[Summary]:
    """Those of all starts that became ready, the oldest first; what cannot be read is left out."""
    found = []
    for path in starts_in(directory):
        with suppress(OSError, ValueError, TypeError, KeyError):
            found.append(Summary.from_json(json.loads((path / SUMMARY).read_text())))
    return found


def _make_own(directory: Path) -> None:
    """Make a directory and its parent for this user only.

    Raises:
        OSError: it cannot be made, exists, or its parent is another user's.
    """
    directory.parent.parent.mkdir(parents=True, exist_ok=True)
    directory.parent.mkdir(mode=0o700, exist_ok=True)
    facts = os.lstat(directory.parent)
    if facts.st_uid != os.geteuid():
        raise PermissionError(f"{directory.parent} is another user's")
    directory.mkdir(mode=0o700)


def _remove_old(root: Path, keep: int) -> None:
    for path in starts_in(root)[:-keep]:
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _NEVER_REMOVED_S:
                shutil.rmtree(path, ignore_errors=True)
