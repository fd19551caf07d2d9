"""Starts made of events as processes write them, for tests of what is read from them."""

import json
from pathlib import Path
from typing import Any

WALL = 1_800_000_000.0
IDENTITY = {"engine": "vllm", "model": "llama", "key": "k1", "layout": "tp1_pp1_dp1", "load_format": "b10_3fs"}

Span = tuple[str, float, float | None] | tuple[str, float, float | None, dict[str, Any]]
"""Phase, begin, end (None: it did not end), and more fields of its first event."""


class MadeStart:
    """The directory of a start; times are seconds of the monotonic clock, which is 1000 at exec."""

    def __init__(self, directory: Path, name: str = "20261130T080000Z-1", **identity: str) -> None:
        self.directory = directory / name
        self.directory.mkdir(parents=True)
        self._identity = {**IDENTITY, **identity}
        self._first = True

    def process(
        self,
        role: str,
        *spans: Span,
        pid: int,
        parent: int = 1,
        began: float = 0.0,
        ready: float | None = None,
        rank: int | None = None,
        node: str = "one",
        clock: float = 1000.0,
    ) -> None:
        lines: list[dict[str, Any]] = [
            {"event": "file", "node": node, "mono": clock + began},
            {"event": "process", "began": clock + began, "mono": clock + began, "ppid": parent, "role": role},
        ]
        if self._first:
            lines.append({"event": "point", "phase": "start", "mono": clock + began, "details": self._identity})
            self._first = False
        for number, (phase, begin, end, *more) in enumerate(spans):
            fields = more[0] if more else {}
            lines.append({"event": "begin", "id": number, "phase": phase, "mono": clock + begin, "tid": pid, **fields})
            if end is not None:
                lines.append({"event": "end", "id": number, "mono": clock + end, "tid": pid})
        if ready is not None:
            lines.append({"event": "point", "phase": "ready", "mono": clock + ready})
        lines.sort(key=lambda line: line["mono"])
        text = ""
        for line in lines:
            fields = {"v": 1, "pid": pid, "wall": WALL + line["mono"] - clock, **line}
            text += json.dumps(fields if rank is None else {**fields, "rank": rank}) + "\n"
        (self.directory / f"{node}-{pid}-0.jsonl").write_text(text)


def usual_start(
    directory: Path,
    name: str = "20261130T080000Z-1",
    *,
    compile_s: float = 20.0,
    cache: str = "nothing",
    verdict: str | None = None,
) -> Path:
    """A server, its engine and one worker: 40 s to ready with ``compile_s`` of 20.

    Args:
        directory: of the starts.
        name: of its own.
        compile_s: seconds that compiling took.
        cache: the status of the restore.
        verdict: to which the save came behind it; None: the server ended before.
    """
    start = MadeStart(directory, name)
    ready = 20.0 + compile_s
    save = ("cache save", ready, ready + 2, {"beside": True, "tid": 98, "details": {"verdict": verdict}})
    start.process(
        "API server",
        ("Python and imports", 0, 4),
        ("configuration", 4, 5),
        ("engine process", 5, ready - 1, {"waits": True}),
        ("server", ready - 1, ready),
        *([] if verdict is None else [save]),
        pid=1,
        parent=0,
        ready=ready,
    )
    start.process(
        "engine core",
        ("Python and imports", 5, 9),
        ("engine setup", 9, ready - 1),
        ("worker processes", 9, 18, {"waits": True}),
        ("cache restore", 9, 10, {"beside": True, "tid": 99, "details": {"status": cache}}),
        pid=2,
        began=5,
    )
    weights = {"bytes": 8_000_000_000, "seconds": 4.0, "source": "posix", "waited": {"source": 3.6}}
    start.process(
        "worker",
        ("Python and imports", 9, 13),
        ("model setup", 13, 18),
        ("model creation", 13, 14),
        ("weights", 14, 18),
        ("weight reading", 14, 18, {"details": weights}),
        ("warm-up", 18, 19 + compile_s),
        ("compile", 18, 18 + compile_s),
        pid=3,
        parent=2,
        began=9,
        rank=0,
    )
    return start.directory
