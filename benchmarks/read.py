"""Measures how fast a checkpoint's bytes reach parameters on the CPU, and prints Markdown for docs/performance.md.

    python benchmarks/read.py

Plain preadv reads into the same parameters are the limit (for cold reads also dd with O_DIRECT); beside this package
run the other loaders that are installed: pip install fastsafetensors runai-model-streamer (with --no-deps where they
would bring another torch). The checkpoint is made once and reused. Every contender's bytes are compared with the files
before it is measured; rounds are interleaved; figures are medians. On a machine that does other things too, they mean
little.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.arguments import parser_of
from benchmarks.checkpoints import kept_checkpoint
from engine_loader.bench import contenders, tables
from engine_loader.bench.contenders import Contender
from engine_loader.bench.rounds import Benchmark, Measurement, Scenario, check_memory, count_runs
from engine_loader.bench.workload import Workload
from engine_loader.cli.console.interrupts import prompt_interrupt
from engine_loader.cli.console.output import progress_bar
from engine_loader.machine import memory

SCENARIOS = {"warm": Scenario(), "fresh": Scenario(fresh=True), "cold": Scenario(cold=True)}
THREADS = (1, 2, 4, 8, 16)


def main() -> None:
    arguments = _arguments()
    path = kept_checkpoint(arguments.dir, arguments.gib, arguments.files)
    workload = Workload.of(path)
    warning = check_memory(workload, memory().available)
    machine = tables.describe_machine(workload)
    scenarios = [SCENARIOS[name] for name in arguments.scenarios]
    chosen = {
        scenario: [c for c in _contenders(scenario) if re.search(arguments.only, c.name)] for scenario in scenarios
    }
    measurements = _measure(workload, chosen, arguments.rounds, arguments.patience)
    print(f"Machine: {tables.machine_line(machine)}.\n")
    print(f"Checkpoint: {tables.workload_line(workload)}. Medians of {arguments.rounds} interleaved rounds.\n")
    print("\n".join(map(tables.markdown, measurements)))
    if warning:
        print(f"**Note:** {warning}")
    if arguments.json:
        results = {"machine": machine, "measurements": [measurement.as_dict() for measurement in measurements]}
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--gib", type=float, default=3.0, help="its size (default: %(default)s)")
    parser.add_argument("--files", type=int, default=6, help="its shards (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default: %(default)s)")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="default: all")
    parser.add_argument(
        "--patience",
        type=float,
        default=0.0,
        metavar="S",
        help="before each run, wait up to so long for other processes",
    )
    parser.add_argument(
        "--only", type=re.compile, default="", metavar="REGEX", help='these contenders, e.g. "preadv, 2|load_into"'
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every round's figure to FILE")
    return parser.parse_args()


def _measure(
    workload: Workload, chosen: dict[Scenario, list[Contender]], rounds: int, patience_s: float
) -> list[Measurement]:
    everyone = {contender.name: contender for group in chosen.values() for contender in group}
    steps = count_runs(list(everyone.values()), 0) + sum(len(group) * rounds for group in chosen.values())
    with prompt_interrupt(), progress_bar(steps) as progress:
        benchmark = Benchmark(workload, list(everyone.values()), progress, patience_s=patience_s)
        benchmark.verify()
        return [benchmark.measure(scenario, rounds, chosen[scenario]) for scenario in chosen]


def _contenders(scenario: Scenario) -> list[Contender]:
    return [
        *(contenders.plain(threads) for threads in THREADS),
        *(contenders.plain(threads, huge_pages=True) for threads in (1, 2, 4) if scenario.fresh),
        *(contenders.dd() if scenario.cold else []),
        *contenders.ours(),
        *([contenders.ours_with_huge_pages()] if scenario.fresh else []),
        *contenders.installed_peers(),
    ]


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
