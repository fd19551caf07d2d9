"""Mutates sound inputs of the parsers for a while: ``python -m tests.fuzzing [--seconds 60] [--seed N] [parser ...]``.

Each input is parsed in a child with limits on memory and CPU time. What is not one of our errors, or takes more, is
written into the current directory, and the exit status is 1.
"""

import argparse
import random
import time
from pathlib import Path

from tests.support.children import ChildDied

from .corpora import Target, targets
from .limits import within_limits
from .mutations import mutated


def main() -> int:
    """Fuzz each parser for its share of the time."""
    known = targets()
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=60)
    arguments.add_argument("--seed", type=int, default=None)
    arguments.add_argument("parsers", nargs="*", default=list(known), help=", ".join(known))
    options = arguments.parse_args()
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    found = 0
    for name in options.parsers:
        found += _fuzz(name, known[name], seed, options.seconds / len(options.parsers))
    return min(found, 1)


def _fuzz(name: str, target: Target, seed: int, seconds: float) -> int:
    """Fuzz one parser; the number of inputs that were written."""
    chance = random.Random(f"{name}-{seed}")
    for content in target.seeds:
        target.parse(content)  # also imports what it needs
    tried = found = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        content = mutated(target.seeds, chance)
        tried += 1
        try:
            within_limits(lambda content=content: target.parse(content))  # type: ignore[misc]
        except ChildDied as error:
            found += 1
            path = Path(f"fuzz-{name}-{seed}-{tried}.bin")
            path.write_bytes(content)
            print(f"{path}: {str(error).strip().splitlines()[-1]}", flush=True)
    print(f"{name}: {tried} inputs, {found} found, seed {seed}", flush=True)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
