"""Who is measured. Each fills the same parameters with the same tensors, in the fastest way that its users are offered.

Opening the files and reading the headers counts, as it does in an engine; importing does not.
"""

from __future__ import annotations

import inspect
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Literal

import torch

from .. import __version__, open_checkpoint
from ..report.load import LoadReport
from ..transfer.memory.huge_pages import ask_for_huge_pages
from .plain_reads import read_plainly, read_with_dd
from .workload import Workload

Targets = Mapping[str, torch.Tensor]
_CPU = torch.device("cpu")


class Stopwatch:
    """When the contender that runs now had read the headers and began with tensors; contenders run one at a time.

    Attributes:
        began: by time.perf_counter; None: it has not begun, or does not tell.
    """

    began: float | None = None

    def reading_begins(self) -> None:
        """From here on tensors are read."""
        self.began = time.perf_counter()


stopwatch = Stopwatch()


@dataclass(frozen=True)
class Contender:
    """One way of reading.

    Attributes:
        name: as in the table.
        kind: "plain" reads are the limit, "ours" is this package, "peer" what users could pick instead.
        load: fills the targets; may return what a reader of the table should know about how it was done.
        version: of the package measured.
        fills: whether the bytes end up in the targets; where not, there is nothing to verify.
    """

    name: str
    kind: Literal["plain", "ours", "peer"]
    load: Callable[[Workload, Targets], str | None]
    version: str = ""
    fills: bool = True


def plain(threads: int, *, huge_pages: bool = False) -> Contender:
    """``preadv`` on this many threads; ``huge_pages``: into memory for which huge pages are asked first."""

    def load(workload: Workload, targets: Targets) -> None:
        if huge_pages:
            ask_for_huge_pages(targets.values())
        read_plainly(workload, targets, threads)

    name = f"preadv, {threads} thread{'' if threads == 1 else 's'}{', huge pages' if huge_pages else ''}"
    return Contender(name, "plain", load)


def dd() -> list[Contender]:
    """``dd iflag=direct``, where it is installed; it bypasses the page cache, so it belongs to cold reads only."""
    found = shutil.which("dd") is not None
    return [Contender("dd iflag=direct", "plain", lambda workload, _: read_with_dd(workload), fills=False)] * found


def ours(**options: Any) -> list[Contender]:
    """``load_into``, and ``tensors()`` with a copy of each; ``options`` are those of open_checkpoint."""
    suffix = "".join(f", {name}={value}" for name, value in options.items())
    return [
        Contender(f"engine_loader load_into{suffix}", "ours", partial(_load_into, options), __version__),
        Contender(f"engine_loader tensors() + copy_{suffix}", "ours", partial(_tensors, options), __version__),
    ]


def ours_with_huge_pages() -> Contender:
    """``tensors()`` with a copy of each into memory for which huge pages were asked, as the engines' adapters do."""

    def load(workload: Workload, targets: Targets) -> str:
        ask_for_huge_pages(targets.values())
        return _tensors({}, workload, targets)

    return Contender("engine_loader tensors() + copy_, huge pages", "ours", load, __version__)


def installed_peers(device: torch.device = _CPU) -> list[Contender]:
    """Those of the other loaders that are installed; ``device``: where they put tensors, if they can."""
    peers = {
        "safetensors": ("safetensors", _safetensors),
        "fastsafetensors": ("fastsafetensors", _fastsafetensors),
        "runai_model_streamer": ("Run:ai Model Streamer", _runai),
    }
    if device.type == "cuda":
        peers["instanttensor"] = ("InstantTensor", _instanttensor)
    return [
        Contender(name, "peer", partial(load, device), _version(module))
        for module, (name, load) in peers.items()
        if find_spec(module) is not None
    ]


def _load_into(options: Mapping[str, Any], workload: Workload, targets: Targets) -> str:
    report = LoadReport()
    with open_checkpoint(workload.path, **options) as checkpoint:
        stopwatch.reading_begins()
        checkpoint.load_into(targets, report=report)
    return _how(report)


def _tensors(options: Mapping[str, Any], workload: Workload, targets: Targets) -> str:
    report = LoadReport()
    with open_checkpoint(workload.path, **options) as checkpoint:
        stopwatch.reading_begins()
        _copy(checkpoint.tensors(report=report), targets)
    return _how(report)


def _how(report: LoadReport) -> str:
    return f"{report.engine}, {'+'.join(sorted(report.modes))}"


def _safetensors(device: torch.device, workload: Workload, targets: Targets) -> None:
    from safetensors import safe_open

    stopwatch.reading_begins()
    for path in workload.files:
        with safe_open(path, framework="pt", device=str(device)) as file:
            # In file order where this version can tell it; its keys() are sorted by name.
            names = file.offset_keys() if hasattr(file, "offset_keys") else file.keys()
            _copy(((name, file.get_tensor(name)) for name in names if name in targets), targets)


def _fastsafetensors(device: torch.device, workload: Workload, targets: Targets) -> None:
    from fastsafetensors import SingleGroup
    from fastsafetensors.parallel_loader import ParallelLoader

    # Tensors are copied at once, so they may be borrowed, unless the copy is under way when they are given back; older
    # versions always clone them.
    borrowed = {"borrowed_tensors": True, "accumulate_resident": False}
    options: dict[str, Any] = {"nogds": True, "use_tqdm_on_load": False, "device": str(device)}
    options |= borrowed if device.type == "cpu" and _accepts(ParallelLoader, "borrowed_tensors") else {}
    loader = ParallelLoader(SingleGroup(), list(workload.files), **options)
    stopwatch.reading_begins()
    try:
        with closing(loader.iterate_weights()) as weights:
            _copy(weights, targets)
    finally:
        loader.close()


def _runai(device: torch.device, workload: Workload, targets: Targets) -> None:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        # As above. To a device, it reads by itself only for several ranks together, and torch copies.
        borrowed = {"owned": False} if _accepts(streamer.stream_files, "owned") else {}
        stopwatch.reading_begins()
        streamer.stream_files(list(workload.files), device="cpu", **borrowed)
        _copy(streamer.get_tensors(), targets)


def _instanttensor(device: torch.device, workload: Workload, targets: Targets) -> None:
    import instanttensor

    stopwatch.reading_begins()
    files, number = list(workload.files), device.index or 0
    with instanttensor.safe_open(files, framework="pt", device=number, process_group=None, copy=True) as opened:
        _copy(opened.tensors(), targets)


def _copy(pairs: Iterator[tuple[str, torch.Tensor]], targets: Targets) -> None:
    for name, tensor in pairs:
        if name in targets:
            targets[name].copy_(tensor)


def _accepts(function: Any, name: str) -> bool:
    parameters = inspect.signature(function).parameters
    if name in parameters or not inspect.isclass(function):
        return name in parameters
    # A constructor that hands its keywords on to its base.
    return any(name in inspect.signature(base).parameters for base in function.__mro__[1:-1])


def _version(module: str) -> str:
    try:
        return version(module)
    except PackageNotFoundError:
        return ""
