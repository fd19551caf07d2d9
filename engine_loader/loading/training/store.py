"""A training checkpoint as an engine's load reads it: each tensor by its bytes, as if it lay in one piece.

What an engine wants of a tensor is asked for as extents of the whole tensor (transfer/plan.py). Here each becomes the
extents of the chunks that have some of it, so that direct mode, too, reads what a rank keeps and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from ...errors import TransferError
from ...formats.safetensors import TensorInfo
from ...report.load import LoadReport
from ...settings import LoaderSettings
from ...sources.source import Source
from ...transfer.device_stream import DeviceStream
from ...transfer.plan import ExtentRow
from ...transfer.protocol import Transfer, wait_or_cancel
from ..devices.cuda import CudaDevices, Devices
from ..geometry import contiguous_strides
from ..safetensors_store import device_for, error_of
from .checkpoint import DcpCheckpoint, DcpTensor
from .files import StoredTensor, dtype_name


@dataclass(frozen=True, slots=True)
class _Box:
    """What a chunk holds of a tensor that is seen as rows: some of the rows, and of each the same bytes.

    Attributes:
        file: its number among the checkpoint's files.
        offset: of its first byte there.
        first_row, end_row: the rows.
        begin, end: the bytes of each.
    """

    file: int
    offset: int
    first_row: int
    end_row: int
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return (self.end_row - self.first_row) * (self.end - self.begin)

    def holds(self, row: int, begin: int, end: int) -> bool:
        """Whether bytes of a row are all here."""
        return self.first_row <= row < self.end_row and self.begin <= begin and end <= self.end


@dataclass(frozen=True, slots=True)
class _Pieces:
    """A tensor as rows of ``pitch`` bytes, and the boxes that make it up."""

    pitch: int
    boxes: tuple[_Box, ...]

    def extents(self, row: ExtentRow, offset: int) -> Iterator[ExtentRow]:
        """An extent of the whole tensor, ``offset`` bytes from its beginning, as extents of the files."""
        _, rows, _, nbytes, stride, address, dst_stride = row
        first, begin = divmod(offset, self.pitch)
        if rows == 1:
            yield from self._run(first, begin, nbytes, address)
        elif stride % self.pitch == 0 and begin + nbytes <= self.pitch:
            yield from self._rows(first, stride // self.pitch, rows, begin, begin + nbytes, address, dst_stride)
        else:
            box = self._box(first, begin, begin + (rows - 1) * stride + nbytes)
            if box is not None:
                place = box.offset + (first - box.first_row) * (box.end - box.begin) + begin - box.begin
                yield ExtentRow(box.file, rows, place, nbytes, stride, address, dst_stride)
                return
            for number in range(rows):
                at = divmod(offset + number * stride, self.pitch)
                yield from self._run(*at, nbytes, address + number * dst_stride)

    def _run(self, row: int, begin: int, nbytes: int, address: int) -> Iterator[ExtentRow]:
        """Consecutive bytes: the end of a row, whole rows, the beginning of one."""
        if begin:
            width = min(nbytes, self.pitch - begin)
            yield from self._rows(row, 1, 1, begin, begin + width, address, 0)
            row, nbytes, address = row + 1, nbytes - width, address + width
        whole, rest = divmod(nbytes, self.pitch)
        if whole:
            yield from self._rows(row, 1, whole, 0, self.pitch, address, self.pitch)
        if rest:
            yield from self._rows(row + whole, 1, 1, 0, rest, address + whole * self.pitch, 0)

    def _rows(
        self, first: int, step: int, count: int, begin: int, end: int, address: int, dst_stride: int
    ) -> Iterator[ExtentRow]:
        """The same bytes of every ``step``-th row."""
        for box in self.boxes:
            low = max(0, -(-(box.first_row - first) // step))
            high = min(count, -(-(box.end_row - first) // step))
            left, right = max(begin, box.begin), min(end, box.end)
            if low >= high or left >= right:
                continue
            pitch, width, rows = box.end - box.begin, right - left, high - low
            src = box.offset + (first + low * step - box.first_row) * pitch + left - box.begin
            dst = address + low * dst_stride + left - begin
            if rows == 1 or (step == 1 and width == pitch == dst_stride):
                yield ExtentRow(box.file, 1, src, rows * width, 0, dst, 0)
            else:
                yield ExtentRow(box.file, rows, src, width, step * pitch, dst, dst_stride)

    def _box(self, row: int, begin: int, end: int) -> _Box | None:
        return next((box for box in self.boxes if box.holds(row, begin, end)), None)


class DcpReader:
    """Reads tensors of a training checkpoint; takes the place of a ``Reader`` (reader.py).

    Optimizer states are left out; names are mapped by the setting ``key_mapping``.

    Args:
        source: where it is.
        directory: its path.
        settings: how to read.
        devices: whose memory can be read into beside the CPU's; None: torch's.

    Attributes:
        infos: its tensors, in the order of their files; file and offset are those of the first chunk.

    Raises:
        CheckpointError: metadata or files are wrong.
        SettingsError: the function that ``key_mapping`` names is not there.
    """

    def __init__(
        self, source: Source, directory: str, settings: LoaderSettings, devices: Devices | None = None
    ) -> None:
        self._devices: Devices = CudaDevices(settings) if devices is None else devices
        self._checkpoint = DcpCheckpoint(source, directory, settings, torch.device("cpu"))
        try:
            tensors = self._checkpoint.located()
        except BaseException:
            self._checkpoint.close()
            raise
        self.infos = [self._checkpoint.info(tensor.name) for tensor, _ in tensors]
        self._pieces = [_pieces(tensor, stored) for tensor, stored in tensors]
        self._numbers = {info.name: number for number, info in enumerate(self.infos)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def paths(self) -> list[str]:
        """The files of ``infos``."""
        return list(dict.fromkeys(info.file for info in self.infos))

    def file_number(self, info: TensorInfo) -> int:
        """The number of a tensor in the extents that ``read`` takes: each counts as a file of its own."""
        return self._numbers[info.name]

    def has_extents(self, info: TensorInfo) -> bool:
        """Whether parts of a tensor can be asked for as extents; others can only be streamed."""
        return self._pieces[self._numbers[info.name]] is not None

    def device_of(self, tensor: torch.Tensor) -> int | None:
        """The device into whose memory a tensor can be read; see ``Reader.device_of``."""
        return device_for(tensor, self._devices, self._checkpoint.files.running_readers)

    def read(self, extents: Sequence[ExtentRow], owner: object, device: int | None = None) -> None:
        """Carry out a plan and wait for it; see ``Reader.read``."""
        if extents:
            wait_or_cancel(self.submit(extents, owner, device))

    def submit(self, extents: Sequence[ExtentRow], owner: object, device: int | None = None) -> Transfer:
        """Start a plan; see ``Reader.submit``."""
        rows: list[ExtentRow] = []
        for row in extents:
            pieces = self._pieces[row[0]]
            assert pieces is not None
            rows += pieces.extents(row, row[2] - self.infos[row[0]].offset)
        place = None if device is None else DeviceStream(device, self._devices.stream(device))
        return self._checkpoint.files.submit_extents(rows, owner, place)

    def stream(self, infos: Iterable[TensorInfo], report: LoadReport) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, CPU tensor) of ``infos``, in their order, reading ahead."""
        yield from self._checkpoint.stream([info.name for info in infos], report)

    def named(self, error: TransferError) -> TransferError:
        """The error of a read with the tensor's name, where one holds the byte."""
        return error_of(self.tensor_at(error.file, error.offset), error)

    def tensor_at(self, file: str | None, offset: int | None) -> str | None:
        """The name of the tensor that holds a byte of a file, for messages."""
        if file is None or offset is None:
            return None
        for info, pieces in zip(self.infos, self._pieces, strict=True):
            for box in () if pieces is None else pieces.boxes:
                if box.offset <= offset < box.offset + box.nbytes and self._checkpoint.files.path_of(box.file) == file:
                    return info.name
        return None

    def finish(self, report: LoadReport) -> None:
        """Check that no file changed meanwhile, and complete the account.

        Raises:
            CheckpointError: a file is shorter than it was.
        """
        self._checkpoint.files.finish(report)

    def close(self) -> None:
        """Cancel what is in flight; give back files and threads. Safe to call twice."""
        self._checkpoint.close()


def _pieces(tensor: DcpTensor, stored: Sequence[StoredTensor | None]) -> _Pieces | None:
    """None where elements are not plain bytes in their order, or chunks were cut in more than two dimensions."""
    dtype = dtype_name(tensor.dtype)
    if dtype is None or dtype == "F4":
        return None
    shape = tensor.shape
    cut = [dim for chunk in tensor.chunks for dim, size in enumerate(chunk.sizes) if size != shape[dim]]
    split = max([1, *cut])
    unit = math.prod(shape[split:]) * tensor.dtype.itemsize
    boxes = []
    for chunk, place in zip(tensor.chunks, stored, strict=True):
        if not math.prod(chunk.sizes):
            continue
        rows = _run(shape[:split], chunk.offsets[:split], chunk.sizes[:split])
        columns = _run(shape[split:], chunk.offsets[split:], chunk.sizes[split:])
        if rows is None or columns is None or place is None or not _is_as_told(place, tensor, chunk.sizes):
            return None
        item = tensor.dtype.itemsize
        boxes.append(_Box(place.file, place.offset, *rows, columns[0] * item, columns[1] * item))
    return _Pieces(unit, tuple(boxes))


def _run(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> tuple[int, int] | None:
    """(first, end) of a box's elements, where they follow each other in the whole."""
    several = next((dim for dim, size in enumerate(sizes) if size != 1), len(sizes))
    if tuple(sizes[several + 1 :]) != tuple(shape[several + 1 :]):
        return None
    strides = contiguous_strides(shape)
    first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    return first, first + math.prod(sizes)


def _is_as_told(place: StoredTensor, tensor: DcpTensor, sizes: Sequence[int]) -> bool:
    """Whether a chunk is stored as the metadata says, its elements in their order."""
    in_order = all(
        stride == expected
        for size, stride, expected in zip(place.shape, place.strides, contiguous_strides(place.shape), strict=True)
        if size != 1
    )
    return place.dtype == tensor.dtype and place.shape == tuple(sizes) and in_order
