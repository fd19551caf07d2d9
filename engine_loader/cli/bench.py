"""``engine-loader bench``: measures how fast a checkpoint is read into parameters on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import EngineLoaderError
from .console.interrupts import prompt_interrupt
from .console.output import console, print_json, print_warning, printable, progress_bar, table

if TYPE_CHECKING:
    from ..bench.contenders import Contender
    from ..bench.rounds import Measurement, Scenario
    from ..bench.workload import Workload

_COLUMNS = ("reads with", "GB/s", "range", "of the limit", "")
"""Those of ``tables.rows``, and the bar: together less than 80 characters."""
_STYLES = {"plain": "", "ours": "bold", "peer": ""}

app = typer.Typer(no_args_is_help=True, help="Measure this machine.", rich_markup_mode="markdown")


@app.callback()
def bench() -> None:
    """Measure how fast weights can be read here."""


@app.command()
def read(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A model's directory, one .safetensors file, or s3://…; OWNER/NAME of the hub's local cache.",
        ),
    ],
    *,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="How often each way of reading is measured.")] = 5,
    cold: Annotated[
        bool, typer.Option("--cold", help="Drop these files from the page cache (posix_fadvise) before every run.")
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Read into memory that was not touched before, as at the start of an engine."),
    ] = False,
    files: Annotated[
        int | None, typer.Option(min=1, help="Read only the first files of the checkpoint, this many.")
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(metavar="N,N,…", help="Threads of the plain reads. Default: 1, 2, 4, … 2 x CPUs, up to 16."),
    ] = None,
    peers: Annotated[bool, typer.Option(help="Also measure the other loaders that are installed.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write the results as one page for a browser.")
    ] = None,
) -> None:
    """Measure how fast a checkpoint is read into parameters in CPU memory.

    This package is compared with plain preadv reads on several threads (the limit of the kernel and the storage), and
    with safetensors, fastsafetensors and the Run:ai Model Streamer if they are installed. Each loads the checkpoint
    once before it is measured, and every byte is compared with the files. Rounds are interleaved; figures are medians.

    --cold drops the files from the kernel's page cache before every run, but not from caches of a storage server, a
    hypervisor or a disk. Nothing is written.

    **Examples**

    ```shell
    engine-loader bench read /models/llama
    engine-loader bench read --fresh --rounds 9 /models/llama
    engine-loader bench read --cold --files 2 --no-peers /mnt/3fs/models/llama
    ```
    """
    from ..bench import contenders, tables
    from ..bench import rounds as measuring
    from ..bench.workload import Workload
    from ..machine import memory
    from ..sources.hub_models import model_here
    from ..sources.registry import is_remote

    path = model_here(path)
    if cold and is_remote(path):
        raise typer.BadParameter("no page cache holds objects of an object store", param_hint="--cold")
    workload = Workload.of(path, files)
    if not workload.nbytes:
        raise EngineLoaderError(f"{path}: there are no bytes to read: all tensors are empty")
    warning = measuring.check_memory(workload, memory().available)
    if warning:
        print_warning(warning)
    machine = tables.describe_machine(workload)
    counts = _thread_counts(threads, remote=workload.remote)
    chosen = [contenders.plain(number, remote=workload.remote) for number in counts]
    chosen += [contenders.plain(number, huge_pages=True, remote=workload.remote) for number in counts if fresh]
    chosen += contenders.ours()
    chosen += [contenders.ours_with_huge_pages()] if fresh else []
    # What other loaders read of object stores, and how, differs too much from one to the next.
    chosen += contenders.installed_peers() if peers and not workload.remote else []
    scenario = measuring.Scenario(fresh=fresh, cold=cold, remote=workload.remote)
    measurement = _measure(workload, chosen, scenario, rounds)
    measurement.warnings += filter(None, [measuring.check_size(workload)])
    if html is not None:
        from ..bench.results_page import page_of_results

        page = page_of_results(measurement, tables.workload_line(workload), tables.machine_line(machine))
        html.write_text(page, encoding="utf-8")
    if as_json:
        checkpoint = {
            "path": path,
            "files": list(workload.files),
            "tensors": len(workload.tensors),
            "bytes": workload.nbytes,
        }
        print_json({"checkpoint": checkpoint, "machine": machine, **measurement.as_dict()})
    else:
        _print(measurement, tables.workload_line(workload), tables.machine_line(machine))
    _fail_on_wrong_bytes(measurement)


def _measure(workload: Workload, chosen: list[Contender], scenario: Scenario, rounds: int) -> Measurement:
    from ..bench.rounds import Benchmark, count_runs

    with prompt_interrupt(), progress_bar(count_runs(chosen, rounds)) as progress:
        benchmark = Benchmark(workload, chosen, progress)
        benchmark.verify()
        return benchmark.measure(scenario, rounds)


def _thread_counts(given: str | None, *, remote: bool) -> list[int]:
    if given is None and remote:
        return [4, 16]
    if given is None:
        from ..machine import usable_cpus

        most = min(16, 2 * usable_cpus())
        return [count for count in (1, 2, 4, 8, 16) if count <= most]
    try:
        counts = [int(part) for part in given.split(",")]
    except ValueError:
        counts = []
    if not counts or not all(1 <= count <= 256 for count in counts):
        raise typer.BadParameter(
            f"{given!r} is not a list of numbers from 1 to 256, like 1,2,4", param_hint="--threads"
        )
    return list(dict.fromkeys(counts))


def _print(measurement: Measurement, workload: str, machine: str) -> None:
    from rich.text import Text

    from ..bench import tables

    out = console()
    out.print(Text(f"{workload}; {measurement.scenario.title}; medians of {measurement.rounds} rounds"), soft_wrap=True)
    shown = table(_COLUMNS, [], right=range(1, len(_COLUMNS) - 1))
    measured = zip(measurement.results, tables.rows(measurement), tables.bars(measurement), strict=True)
    for result, row, bar in measured:
        shown.add_row(
            *map(printable, row), bar, style=_STYLES[result.contender.kind] if result.error is None else "red"
        )
    out.print(shown)
    for line in tables.ways(measurement):
        out.print(Text(line, "dim"), soft_wrap=True)
    out.print(Text(machine, "dim"), soft_wrap=True)
    for warning in measurement.warnings:
        print_warning(warning)


def _fail_on_wrong_bytes(measurement: Measurement) -> None:
    for result in measurement.results:
        if result.contender.kind == "ours" and result.verified is False:
            raise EngineLoaderError(
                f"{result.contender.name} loaded wrong bytes: {result.error}; this is a bug, report it"
            )
