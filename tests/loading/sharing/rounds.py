"""Rounds in which the ranks of a node load together, and some are killed, stopped, late, of another layout, or get bad
reads, or the window is too small; each is drawn from a seed.

    python -m tests.loading.sharing.rounds FOLDER ROUNDS SEED

It prints a line of JSON: how many ranks ended how, the longest time that one took, and the longest that one waited in
vain for another or for room in the window. A rank that was let live has
the right bytes, or (where reads were bad) an error about the file; else the program ends with an assertion. Ranks are
forked from a process that has imported everything. With the shim for faults (tests/transfer/native/shim) preloaded,
reads are slow, so that faults fall into them, and fail.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import signal
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .rank import Options, checksum, load, part_of

TIMEOUT_S = 1.0
HANG_S = 120.0
SHAPES = {
    "q.rows": (768, 512),
    "o.inner": (512, 768),
    "d.inner": (640, 1200),
    "n.whole": (512, 300),
    "e.own": (512, 200),
}


@dataclass
class Fate:
    """What befalls a rank: seconds after the start of its round; None: never.

    Attributes:
        fall: a signal that comes while it reads a block for all others; the other attributes say what follows.
        fall_after_s: so long after it was first seen to read.
    """

    late_s: float = 0.0
    stop_at: float | None = None
    go_on_at: float | None = None
    kill_at: float | None = None
    fall: int = 0
    fall_after_s: float = 0.0

    @property
    def stops(self) -> bool:
        return self.go_on_at is not None or self.fall == signal.SIGSTOP


@dataclass
class Running:
    options: Options
    fate: Fate
    stops: bool
    pid: int
    pipe: int
    text: bytes = b""
    ended: bool = False


class Faults:
    """The shim's shared words, where it is preloaded."""

    def __init__(self) -> None:
        self._words: mmap.mmap | None = None
        path = os.environ.get("ENGINE_LOADER_FAULTS")
        if path:
            with open(path, "r+b") as file:
                self._words = mmap.mmap(file.fileno(), 0)

    def set(self, *, error_every: int = 0, delay_us: int = 0) -> None:
        if self._words is not None:
            self._words[:28] = struct.pack("7I", error_every, 5, 0, 0, 0, 0, delay_us)


def make_checkpoint(path: Path, layers: int = 6) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for name, shape in SHAPES.items():
            values = torch.randint(-30000, 30000, shape, dtype=torch.int16, generator=generator)
            tensors[f"m.{layer}.{name}"] = values
    save_file(tensors, path)


def draw_fate(draw: random.Random) -> Fate:
    at = draw.uniform(0, draw.choice([0.1, 0.4, 1.5]))  # a load takes as long, or longer where the machine is busy
    after = draw.choice([0.0, draw.uniform(0, 0.1)])
    match draw.randrange(12):
        case 0:
            return Fate(kill_at=at)
        case 1:
            return Fate(stop_at=at, go_on_at=at + draw.uniform(0.2, 2 * TIMEOUT_S))
        case 2:
            return Fate(stop_at=at, kill_at=at + draw.uniform(0.2, 2 * TIMEOUT_S))
        case 3:
            return Fate(late_s=draw.uniform(0.02, 0.4))
        case 4 | 5:
            return Fate(fall=signal.SIGKILL, fall_after_s=after)
        case 6 | 7:
            return Fate(fall=signal.SIGSTOP, fall_after_s=after, go_on_at=at + draw.uniform(0.2, 2 * TIMEOUT_S))
    return Fate()


def start(options: Options, fate: Fate, begin: float) -> Running:
    options = replace(options, fall=int(fate.fall), fall_after_s=fate.fall_after_s)
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return Running(options, fate, fate.stops, pid, read)
    try:
        os.close(read)
        time.sleep(max(0.0, begin + fate.late_s - time.monotonic()))
        with os.fdopen(write, "w") as out:
            out.write(json.dumps(load(options)))
    except BaseException as error:
        print(f"rank {options.rank}: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def run(ranks: list[Running], begin: float) -> float:
    """Until all have ended; returns the seconds that the last one took that nobody stopped or killed."""
    longest = 0.0
    while not all(rank.ended for rank in ranks):
        now = time.monotonic() - begin
        assert now < HANG_S, [rank.options for rank in ranks if not rank.ended]
        for rank in ranks:
            fate = rank.fate
            if rank.ended:
                continue
            if fate.stop_at is not None and now >= fate.stop_at:
                fate.stop_at = None
                os.kill(rank.pid, signal.SIGSTOP)
            if fate.go_on_at is not None and now >= fate.go_on_at:  # for good: it may stop itself later
                os.kill(rank.pid, signal.SIGCONT)
            if fate.kill_at is not None and now >= fate.kill_at:
                fate.kill_at = None
                os.kill(rank.pid, signal.SIGKILL)
        readable, _, _ = select.select([rank.pipe for rank in ranks if not rank.ended], [], [], 0.01)
        for rank in ranks:
            if rank.pipe not in readable or rank.ended:
                continue
            got = os.read(rank.pipe, 1 << 20)
            rank.text += got
            if not got:
                os.close(rank.pipe)
                os.waitpid(rank.pid, 0)
                rank.ended = True
                if rank.text:
                    longest = max(longest, float(json.loads(rank.text)["seconds"]))
    return longest


def main() -> None:
    folder, rounds, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    path = folder / "model.safetensors"
    make_checkpoint(path)
    truth: dict[tuple[str, int, int], str] = {}
    with safe_open(path, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (it is no mapping)
            tensor = opened.get_tensor(name)
            for of in range(2, 6):
                for rank in range(of):
                    truth[name, rank, of] = checksum(part_of(name, tensor, rank, of))
    faults = Faults()
    found: Counter[str] = Counter()
    longest = longest_wait = 0.0
    for number in range(rounds):
        draw = random.Random(seed * 100_003 + number)
        count = draw.randint(2, 4)
        bad = draw.choice([0, 0, 0, draw.randint(2, 12), 1])
        settings: dict[str, Any] = {
            "read_mode": "direct",
            "io_bytes": 256 << 10,
            "share": "auto",
            "share_bytes": draw.choice([16, 64, 256]) << 20,
            "share_timeout_s": TIMEOUT_S,
            "max_tries": 3,
        }
        faults.set(error_every=bad, delay_us=draw.choice([1000, 10_000, 40_000]))
        layouts = [(rank, count) for rank in range(count)]
        if draw.randrange(4) == 0:
            layouts.append((0, 5))  # of another engine
        begin = time.monotonic() + 0.1  # all at once, so that they meet
        ranks = [
            start(Options([str(path)], rank, of, count, settings, batch=draw.randint(1, 9)), draw_fate(draw), begin)
            for rank, of in layouts
        ]
        longest = max(longest, run(ranks, begin))
        print(f"round {number}: {dict(found)}, at most {longest:.2f} s", file=sys.stderr, flush=True)
        for rank in ranks:
            if not rank.text:
                found["ended"] += 1
                found["ended reading"] += rank.fate.fall == signal.SIGKILL
                continue
            answer = json.loads(rank.text)
            if not rank.stops and "longest_wait_ns" in answer:
                longest_wait = max(longest_wait, answer["longest_wait_ns"] / 1e9)
            found["taken over"] += answer.get("taken_over", 0) > 0
            if "error" in answer:
                assert bad and str(path) in answer["error"], (number, answer)
                found["error"] += 1
                continue
            for name, value in answer["sums"].items():
                assert truth[name, rank.options.rank, rank.options.ranks] == value, (number, name, rank.options)
            found["right"] += 1
            found["from others"] += answer.get("shared_bytes", 0) > 0
            found["past the window"] += answer.get("left_bytes", 0) > 0
            found["evicted"] += answer.get("evicted", 0) > 0
    faults.set()
    # A healthy round cleans up what the killed left behind.
    now = time.monotonic()
    healthy = {"read_mode": "direct", "share": "auto"}
    run([start(Options([str(path)], rank, 2, 2, healthy), Fate(), now) for rank in range(2)], now)
    print(json.dumps({**found, "longest_s": round(longest, 2), "longest_wait_s": round(longest_wait, 2)}))


if __name__ == "__main__":
    main()
