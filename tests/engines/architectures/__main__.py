"""Compares what our loader makes of vLLM's architectures with what vLLM's own makes of them, each in a tiny form.

    python -m tests.engines.architectures [NAME ...]

Prints a table, and fails if any differs or fewer than before load. Workers take the architectures one by one; one that
kills its worker, or takes too long, is an obstacle like any other.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue

from .comparing import Outcome

LOADED_AT_LEAST = 190
TIMEOUT_S = 300
_OBSTACLE = "not loaded by auto either, or no tiny checkpoint of it"
ROOT = Path(__file__).resolve().parents[3]


class Worker:
    """A process that compares architectures, started anew when one has killed it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def compare(self, architecture: str) -> Outcome:
        """The outcome for ``architecture``."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{architecture}\n")
        process.stdin.flush()
        ready = select.select([process.stdout], [], [], TIMEOUT_S)[0]
        line = process.stdout.readline() if ready else ""
        if line:
            return Outcome(**json.loads(line))
        self.end()
        return Outcome(architecture, obstacle="its process died" if ready else f"not done after {TIMEOUT_S} s")

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __package__, "--worker"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return self._process

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def serve() -> None:
    """Work of one worker: reads names from its standard input and writes outcomes to its standard output."""
    # What vLLM and its libraries print goes elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    make_torchvision_importable()
    from .comparing import compare

    for line in sys.stdin:
        print(json.dumps(asdict(compare(line.strip()))), file=answers, flush=True)


def make_torchvision_importable() -> None:
    """Half of the multimodal models import torchvision. Its build for GPUs, which pip brings, lies apart from the rest
    of the environment (see the Makefile), and lacks its operators: none runs here, but two are looked up.
    """
    sys.path.append(str(Path(sys.prefix) / "torchvision"))
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_torchvision"] = library  # its declarations go when it goes


def registered() -> list[str]:
    """The names in vLLM's registry."""
    from vllm.model_executor.models import registry

    return list(registry._VLLM_MODELS)


def compare_all(architectures: Sequence[str], workers: int) -> list[Outcome]:
    """The outcomes, in order of the architectures."""
    left: SimpleQueue[str | None] = SimpleQueue()
    for architecture in [*architectures, *[None] * workers]:
        left.put(architecture)
    outcomes: dict[str, Outcome] = {}

    def work() -> None:
        worker = Worker()
        while (architecture := left.get()) is not None:
            outcome = outcomes[architecture] = worker.compare(architecture)
            print(line_of(outcome), flush=True)
        worker.end()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[architecture] for architecture in architectures]


def line_of(outcome: Outcome) -> str:
    """The outcome's line in the table."""
    if outcome.obstacle:
        return f"{outcome.architecture:48} {_OBSTACLE}: {outcome.obstacle}"
    if outcome.differing:
        return f"{outcome.architecture:48} DIFFERENT {json.dumps(outcome.differing)}"
    made = "as vLLM asks for them" if outcome.as_asked else "of transformers"
    return f"{outcome.architecture:48} equal: {outcome.tensors} tensors {made}, {outcome.seconds:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all of vLLM's registry if none is given")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve()
        return 0
    outcomes = compare_all(arguments.names or registered(), arguments.workers)
    equal = sum(outcome.equal for outcome in outcomes)
    different = [outcome.architecture for outcome in outcomes if outcome.differing]
    print(
        f"{equal} of {len(outcomes)} load, and equal in all modes; {len(different)} differ {different or ''}; "
        f"{len(outcomes) - equal - len(different)} {_OBSTACLE}"
    )
    return int(bool(different) or (not arguments.names and equal < LOADED_AT_LEAST))


if __name__ == "__main__":
    sys.exit(main())
