"""What every engine's adapter does with weight files: check them, stream them, show progress, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeAlias

import torch

from ..formats.safetensors import TensorInfo
from ..report.events import PLACE, PROGRESS, recorder
from ..report.load_report import LoadReport
from ..report.phases import HEADERS, WEIGHT_READING
from ..report.progress import byte_progress
from ..sources.registry import make_source
from ..sources.stock import Stock, StockedSource
from .devices.per_tensor import TargetDevice
from .direct.load import SMALL_BYTES, DirectLoad
from .find import SafetensorsFiles, TrainingCheckpoint, natural_key
from .open_store import open_store, store_of_files
from .shards import follow_indexes, open_files
from .store import TensorStore

if TYPE_CHECKING:
    from ..settings import LoaderSettings
    from .sharing import NodeRanks

WeightFiles: TypeAlias = Iterable[str] | TrainingCheckpoint
"""What an engine is to load: safetensors files, or a training checkpoint."""

# Recording takes some tens of microseconds a tensor; in that time one up to this size is read whole and copied. (The
# smallest are not recorded anyway.)
_MANY_TENSORS = 20_000
_COSTLY_BYTES = 256 << 10


def stream_weights(
    weights: WeightFiles,
    settings: LoaderSettings,
    *,
    skip: Callable[[str], bool] | None = None,
    show_progress: bool = False,
    tell: Callable[[str], object] = lambda line: None,
    note: str | None = None,
    direct: DirectLoad | None = None,
    device: TargetDevice = None,
    ranks: NodeRanks | None = None,
    report: LoadReport | None = None,
    stock: Stock | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of all ``weights``: the files in natural order, each in file order.

    Args:
        weights: safetensors files; where an index lies beside them, it says which of two copies counts. Or a training
            checkpoint.
        settings: how to read.
        skip: a tensor for whose name it is true is not read.
        show_progress: show a bar.
        tell: called with the account, one line, when all has been loaded.
        note: a remark for that line.
        direct: the load in direct mode of which this is a part; then the tensors are recording ones (see direct.py).
        device: where streamed tensors are put; None: into the CPU's memory, as is what a load in direct mode streams in
            the end, and a training checkpoint.
        ranks: of this machine, that load the same files; None: this process alone.
        report: the account that is kept; None: a new one.
        stock: what of them was read ahead; None: nothing.

    Raises:
        CheckpointError: a file, a header or the index is wrong, or bytes could not be read.
        SettingsError: GPUDirect Storage was asked for and cannot be used.
    """
    with ExitStack() as stack:
        if not isinstance(weights, TrainingCheckpoint):
            weights = list(weights)
        with recorder.span(HEADERS, watched={PLACE: _place_of(weights)}):
            store = stack.enter_context(open_weights(weights, settings, ranks, stock))
            del stock  # its memory goes with the files
            infos = [info for info in store.infos if skip is None or not skip(info.name)]
        report = report or LoadReport()
        if note:
            report.add_note(note)
        if settings.key_mapping and not store.key_mapping_applies:
            report.add_note("key_mapping is for training checkpoints and was not applied")
        if store.left_out:
            report.add_note(store.left_out)
        progress = byte_progress(sum(info.nbytes for info in infos), "Loading weights (b10_3fs)", shown=show_progress)
        stack.callback(progress.close)
        watched = {PLACE: _place_of(weights), PROGRESS: lambda: (*progress.counts(), report.waits_for)}
        tell = _ending_phase(recorder.begin(WEIGHT_READING, watched=watched), report, tell)
        if direct is not None and settings.mode == "auto":
            recorded = [info for info in infos if info.nbytes > SMALL_BYTES]
            if _cost_more_to_record_than_to_read(recorded):
                report.add_note(f"streamed: {len(recorded)} tensors this small cost more to record than to read")
                direct = None
        if direct is not None:
            stack.pop_all()  # the direct load closes them: it reads on when all tensors have been handed out
            yield from direct.tensors(store, infos, report, progress=progress, log=tell)
            return
        if not store.streams_to_devices:
            device = None
        if device is not None:
            report.add_note(f"handed over on {device}")
        for info, pair in zip(infos, _timed(store.stream(infos, report, device), report), strict=True):
            yield pair
            progress.update(info.nbytes)
        store.finish(report)
    tell(report.line())


def _place_of(weights: list[str] | TrainingCheckpoint) -> str:
    if isinstance(weights, TrainingCheckpoint):
        return weights.directory
    return weights[0] if weights else ""


def _ending_phase(number: int, report: LoadReport, tell: Callable[[str], object]) -> Callable[[str], object]:
    """``tell``, which also ends a phase of the start."""

    def end_and_tell(line: str) -> None:
        recorder.end(number, **report.to_details())
        tell(line)

    return end_and_tell


def _timed(pairs: Iterable[tuple[str, torch.Tensor]], report: LoadReport) -> Iterator[tuple[str, torch.Tensor]]:
    """``pairs``, with the time that each took to come, and to be used, in the account."""
    asked, report.waits_for = time.perf_counter(), "source"
    for pair in pairs:
        came, report.waits_for = time.perf_counter(), "engine"
        report.add_wait("source", came - asked)
        yield pair
        asked, report.waits_for = time.perf_counter(), "source"
        report.add_wait("engine", asked - came)


def check_weights(
    weights: WeightFiles, settings: LoaderSettings, begin: Callable[[TensorStore], object] = lambda store: None
) -> None:
    """Open ``weights`` and look at all that is no tensor's data, as ``stream_weights`` does first.

    Args:
        weights: the files.
        settings: how to read.
        begin: called with the open store, before it is found out where in their files the tensors lie.

    Raises:
        CheckpointError: a file, a header, the index or the metadata is wrong.
    """
    with open_weights(weights, settings) as store:
        begin(store)
        _ = store.infos  # a training checkpoint finds out where in its files they lie


def open_weights(
    weights: WeightFiles, settings: LoaderSettings, ranks: NodeRanks | None = None, stock: Stock | None = None
) -> TensorStore:
    """Open what an engine is to load: of two copies of a tensor, without the one that an index does not name.

    Raises:
        CheckpointError: a file, a header, the index or the metadata is wrong.
    """
    source = make_source(settings.backend, settings=settings)
    if stock is not None:
        source = StockedSource(source, stock)
    if isinstance(weights, TrainingCheckpoint):
        return open_store(source, weights, settings)
    found = SafetensorsFiles(tuple(sorted(weights, key=natural_key)))
    files = open_files(source, found)
    try:
        follow_indexes(source, files)
        return store_of_files(source, files, settings, ranks=ranks)
    except BaseException:
        files.close()
        raise


def _cost_more_to_record_than_to_read(infos: Sequence[TensorInfo]) -> bool:
    """Whether there are so many and so small tensors that planning their copies takes longer than copying them."""
    return len(infos) > _MANY_TENSORS and sum(info.nbytes for info in infos) < len(infos) * _COSTLY_BYTES
