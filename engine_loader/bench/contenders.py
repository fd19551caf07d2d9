"""The ways of reading that are measured. Each fills the same parameters, in the fastest way that its package documents.

The time to open the files and to read the headers counts, as in an engine; the time of imports does not.
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
from ..report.load_report import LoadReport
from ..transfer.memory.huge_pages import advise_huge_pages, ask_for_huge_pages
from .plain_reads import read_plainly, read_with_dd
from .workload import Workload

Targets = Mapping[str, torch.Tensor]
_CPU = torch.device("cpu")


class Stopwatch:
    """The moment at which the running contender has read the headers and begins to read tensors.

    Attributes:
        began: by time.perf_counter; None: the contender has not begun to read tensors, or does not report it.
    """

    began: float | None = None

    def reading_begins(self) -> None:
        """Record that the reading of tensors begins now. Contenders run one at a time."""
        self.began = time.perf_counter()


stopwatch = Stopwatch()


@dataclass(frozen=True)
class Contender:
    """One way of reading.

    Attributes:
        name: for the table of results.
        kind: "plain": a plain read, as the limit; "ours": this package; "peer": another loader.
        load: fills the targets; may return a description of how it read, for the table of results.
        version: of the measured package.
        fills: True if the bytes are written to the targets; otherwise they cannot be verified.
    """

    name: str
    kind: Literal["plain", "ours", "peer"]
    load: Callable[[Workload, Targets], str | None]
    version: str = ""
    fills: bool = True


def plain(threads: int, *, huge_pages: bool = False, remote: bool = False) -> Contender:
    """``preadv`` on this many threads, or (``remote``) requests for ranges; ``huge_pages``: huge pages are asked for
    under the targets first.
    """

    def load(workload: Workload, targets: Targets) -> None:
        if huge_pages:
            advise_huge_pages(targets.values())
        read_plainly(workload, targets, threads)

    how = "plain requests" if remote else "preadv"
    name = f"{how}, {threads} thread{'' if threads == 1 else 's'}{', huge pages' if huge_pages else ''}"
    return Contender(name, "plain", load)


def dd() -> list[Contender]:
    """``dd iflag=direct``, if it is installed. It bypasses the page cache, so it is a limit for cold reads only."""
    if shutil.which("dd") is None:
        return []
    return [Contender("dd iflag=direct", "plain", lambda workload, _: read_with_dd(workload), fills=False)]


def ours(**options: Any) -> list[Contender]:
    """``load_into``, and ``tensors()`` followed by a copy of each tensor; ``options`` are passed to open_checkpoint."""
    suffix = "".join(f", {name}={value}" for name, value in options.items())
    return [
        Contender(f"engine_loader load_into{suffix}", "ours", partial(_load_into, options), __version__),
        Contender(f"engine_loader tensors() + copy_{suffix}", "ours", partial(_tensors, options), __version__),
    ]


def ours_with_huge_pages() -> Contender:
    """``tensors()`` with a copy of each tensor into memory for which huge pages are requested, as in the adapters."""

    def load(workload: Workload, targets: Targets) -> str:
        ask_for_huge_pages(targets.values())
        return _tensors({}, workload, targets)

    return Contender("engine_loader tensors() + copy_, huge pages", "ours", load, __version__)


def installed_peers(device: torch.device = _CPU) -> list[Contender]:
    """The other loaders that are installed; ``device``: the device for tensors of those that can choose one."""
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
            # offset_keys(), in newer versions, is in file order; keys() is sorted by name.
            names = file.offset_keys() if hasattr(file, "offset_keys") else file.keys()
            _copy(((name, file.get_tensor(name)) for name in names if name in targets), targets)


def _fastsafetensors(device: torch.device, workload: Workload, targets: Targets) -> None:
    from fastsafetensors import SingleGroup
    from fastsafetensors.parallel_loader import ParallelLoader

    # Tensors are copied immediately, so they can be borrowed, except on a device, where the copy can still run when
    # they are given back. Older versions always clone them.
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
        # Tensors are borrowed, as above. It reads to a device only for several ranks together, so torch copies here.
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
    # The constructor passes its keywords to that of a base class.
    return any(name in inspect.signature(base).parameters for base in function.__mro__[1:-1])


def _version(module: str) -> str:
    try:
        return version(module)
    except PackageNotFoundError:
        return ""
