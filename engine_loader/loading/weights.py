"""What every engine's adapter does with a list of weight files: check them, stream them, show progress, tell the
account."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

import torch

from ..errors import CheckpointError
from ..formats.hf_index import INDEX_NAME
from ..formats.safetensors import TensorInfo
from ..report.load import LoadReport
from ..report.progress import byte_progress
from ..settings import LoaderSettings
from ..sources.registry import make_source
from ..sources.source import Source
from .direct.load import SMALL_BYTES, DirectLoad
from .find import OpenFiles, natural_key, open_files, read_index
from .safetensors_store import Reader, no_gds_for_training
from .training.store import DcpReader

# Recording takes some tens of microseconds a tensor; in that time one up to this size is read whole and copied. (The
# smallest are not recorded anyway.)
_MANY_TENSORS = 20_000
_COSTLY_BYTES = 256 << 10


def stream_weights(
    weights: str | Iterable[str],
    settings: LoaderSettings,
    *,
    skip: Callable[[str], bool] | None = None,
    show_progress: bool = False,
    tell: Callable[[str], object] = lambda line: None,
    note: str | None = None,
    direct: DirectLoad | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of all ``weights``: the files in natural order, each in file order.

    Args:
        weights: safetensors files; where an index lies beside them, they are checked against it. Or the directory of a
            training checkpoint.
        settings: how to read.
        skip: a tensor for whose name it is true is not read.
        show_progress: show a bar.
        tell: is given the account, one line, when all has been loaded.
        note: a remark for that line.
        direct: the load in direct mode of which this is a part; then the tensors are recording ones (see direct.py).
        device: where streamed tensors are put; None: into the CPU's memory, as is what a load in direct mode streams in
            the end, and a training checkpoint.

    Raises:
        CheckpointError: a file, a header or the index is wrong, or bytes could not be read.
        SettingsError: GPUDirect Storage was asked for and cannot be used.
    """
    with ExitStack() as stack:
        reader = _open(weights, settings)
        stack.callback(reader.close)
        infos = [info for info in reader.infos if skip is None or not skip(info.name)]
        report = LoadReport()
        if note:
            report.add_note(note)
        if settings.key_mapping and not isinstance(reader, DcpReader):
            report.add_note("key_mapping is for training checkpoints and was not applied")
        progress = byte_progress(sum(info.nbytes for info in infos), "Loading weights (b10_3fs)", shown=show_progress)
        stack.callback(progress.close)
        if direct is not None and settings.mode == "auto":
            recorded = [info for info in infos if info.nbytes > SMALL_BYTES]
            if _cost_more_to_record_than_to_read(recorded):
                report.add_note(f"streamed: {len(recorded)} tensors this small cost more to record than to read")
                direct = None
        if direct is not None:
            stack.pop_all()  # the direct load closes them: it reads on when all tensors have been handed out
            yield from direct.tensors(reader, infos, report, progress=progress, log=tell)
            return
        for info, pair in zip(infos, _streamed(reader, infos, report, device), strict=True):
            yield pair
            progress.update(info.nbytes)
        reader.finish(report)
    tell(report.line())


def _streamed(
    reader: Reader | DcpReader, infos: Sequence[TensorInfo], report: LoadReport, device: torch.device | None
) -> Iterator[tuple[str, torch.Tensor]]:
    if device is None or isinstance(reader, DcpReader):
        return reader.stream(infos, report)
    report.add_note(f"handed over on {device}")
    return reader.stream_to(device, infos, report)


def check_weights(weights: str | Iterable[str], settings: LoaderSettings) -> None:
    """Open ``weights`` and look at all that is no tensor's data, as ``stream_weights`` does first.

    Raises:
        CheckpointError: a file, a header, the index or the metadata is wrong.
    """
    _open(weights, settings).close()


def _open(weights: str | Iterable[str], settings: LoaderSettings) -> Reader | DcpReader:
    source = make_source(settings.backend, settings=settings)
    if isinstance(weights, str):
        if settings.transport == "gds":
            raise no_gds_for_training(weights)
        return DcpReader(source, weights, settings)
    in_order: list[str] = sorted(weights, key=natural_key)
    reader = Reader(open_files(source, in_order), source.name, settings)
    try:
        _check_indexes(source, reader.files)
    except BaseException:
        reader.close()
        raise
    return reader


def _cost_more_to_record_than_to_read(infos: Sequence[TensorInfo]) -> bool:
    """Whether there are so many and so small tensors that planning their copies takes longer than copying them."""
    return len(infos) > _MANY_TENSORS and sum(info.nbytes for info in infos) < len(infos) * _COSTLY_BYTES


def _check_indexes(source: Source, files: OpenFiles) -> None:
    """Check the files against the indexes of their directories.

    An engine may rightly leave out shards that an index lists; but what it does read must hold what the index says.

    Raises:
        CheckpointError: a shard does not have a tensor that the index puts into it.
    """
    held: dict[str, set[str]] = {}
    for info in files.tensors:
        held.setdefault(info.file, set()).add(info.name)
    for directory in {os.path.dirname(opened.file.path) for opened in files.files}:
        if os.path.basename(INDEX_NAME) not in source.list(directory or "."):
            continue
        index = read_index(source, directory)
        for name, shard in index.weight_map.items():
            names = held.get(os.path.join(directory, shard))
            if names is not None and name not in names:
                raise CheckpointError(
                    f"the index puts {name!r} into {shard!r}, which does not have it",
                    file=index.file,
                    hint="index and shards are of different checkpoints, or a shard is damaged",
                )
