"""The store of tensors in a training checkpoint (torch.distributed.checkpoint, DCP)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...formats.safetensors import TensorInfo
from ...report.load_report import LoadReport
from ...sources.source import Source
from ...transfer.device_stream import DeviceStream
from ...transfer.plan import ExtentRow
from ...transfer.protocol import Transfer
from ..devices.cuda import CudaDevices, Devices
from ..devices.per_tensor import TargetDevice, gpu_of, is_on_cpu
from ..find import without_end
from ..geometry import joined
from ..mapping.named_layouts import misread_layout
from ..store import TensorStore, device_for
from .beside import LeftOut
from .boxes import Pieces
from .chunks import ChunkReader
from .files import DcpFiles
from .key_mapping import KeyMapping, make_renamer
from .pieces import pieces_of
from .tensors import DcpTensor, state_paths, tensors_of
from .torch_load import check_not_quantised

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

    from ...settings import LoaderSettings


logger = logging.getLogger(__name__)

_GAP_BYTES = 64 << 10  # of other items between the model's: one read goes over them


class TrainingStore(TensorStore):
    """The tensors of a training checkpoint, their chunks put together.

    Where in their files the chunks lie is found out when it is asked for. In extents, each tensor counts as a file.

    Args:
        source: where it is.
        directory: its path.
        settings: how to read.
        devices: whose memory can be read into beside the CPU's; None: torch's.
        key_mapping: from the training's names to those that are wanted (see key_mapping.py); None: the setting.
        optimizer_state: also serve what is not the model's (see beside.py), which is not looked at otherwise: the
            tensors of optimizers, averaged copies, states of random generators.
        saved: its metadata (see parts.py); None: what is in its ``.metadata``.

    Attributes:
        files: its files.
        chunks: reads its chunks.
        tensors: what is served, by name, in the order of the files.

    Raises:
        CheckpointError: the metadata is missing or wrong, or two tensors get the same name.
        SettingsError: the function that ``key_mapping`` names is not there.
    """

    key_mapping_applies = True
    streams_to_devices = False

    def __init__(
        self,
        source: Source,
        directory: str,
        settings: LoaderSettings,
        devices: Devices | None = None,
        *,
        key_mapping: KeyMapping | None = None,
        optimizer_state: bool = False,
        saved: Metadata | None = None,
    ) -> None:
        self._devices: Devices = CudaDevices(settings) if devices is None else devices
        self.files = DcpFiles(source, without_end(directory), settings)
        self.listing = self.files.metadata_path if saved is None else directory
        try:
            mapping = settings.key_mapping if key_mapping is None else key_mapping
            rename = make_renamer(mapping)
            self._saved: Metadata = self.files.read_metadata() if saved is None else saved
            left_out = LeftOut()
            self.tensors = tensors_of(self._saved, self.listing, rename, left_out, optimizer_state=optimizer_state)
            self.left_out = left_out.line()
            _warn_of_layout(self.tensors)
        except BaseException:
            self.files.close()
            raise
        self.chunks = ChunkReader(self.files, int(settings.buffer_bytes))
        self._infos = {name: tensor.info(*self._begin(tensor)) for name, tensor in self.tensors.items()}
        self.paths = list(dict.fromkeys(info.file for info in self._infos.values()))
        self._names = list(self.tensors)
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._located: dict[str, tuple[TensorInfo, Pieces | None]] = {}

    @property
    def infos(self) -> list[TensorInfo]:
        return self.located(list(self._infos.values()))

    def by_name(self) -> dict[str, TensorInfo]:
        return self._infos

    def metadata(self) -> dict[str, str]:
        return {}

    def located(self, infos: Sequence[TensorInfo]) -> list[TensorInfo]:
        unknown = [self.tensors[info.name] for info in infos if info.name not in self._located]
        for tensor, chunks in zip(unknown, self.chunks.locate(unknown), strict=True):
            first = chunks[0] if chunks else None
            info = self._infos[tensor.name]
            if first is not None:
                info = tensor.info(self.files.path_of(first.file), first.offset)
            self._located[tensor.name] = info, pieces_of(tensor, chunks)
        return [self._located[info.name][0] for info in infos]

    def dtype_and_shape(self, info: TensorInfo) -> tuple[torch.dtype, tuple[int, ...]]:
        tensor = self.tensors[info.name]
        check_not_quantised(tensor.dtype, tensor.stored_name, info.file, info.offset)
        return tensor.dtype, tensor.shape

    def has_extents(self, info: TensorInfo) -> bool:
        self.located([info])
        return self._located[info.name][1] is not None

    def file_number(self, info: TensorInfo) -> int:
        return self._numbers[info.name]

    def device_of(self, tensor: torch.Tensor) -> int | None:
        return device_for(tensor, self._devices, self.files.running_readers)

    def staging(self, target: torch.Tensor) -> torch.device:
        return torch.device("cpu")

    def submit(self, extents: Sequence[ExtentRow], owner: object, device: int | None = None) -> Transfer:
        rows: list[ExtentRow] = []
        for row in extents:
            info, pieces = self._located[self._names[row[0]]]
            assert pieces is not None
            rows += pieces.extents(row, row[2] - info.offset)
        stream = None if device is None else DeviceStream(device, self._devices.stream(device))
        return self.files.submit_extents(rows, owner, stream)

    def stream(
        self, infos: Iterable[TensorInfo], report: LoadReport, device: TargetDevice = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        gpu = gpu_of(device)
        for name, tensor in self.chunks.stream([(self.tensors[info.name], info) for info in infos], report):
            yield name, tensor if gpu is None or is_on_cpu(device, name) else tensor.to(gpu)

    def tensor_at(self, file: str | None, offset: int | None) -> str | None:
        if file is None or offset is None:
            return None
        for info, pieces in self._located.values():
            for piece in () if pieces is None else pieces.pieces:
                if piece.offset <= offset < piece.offset + piece.nbytes and self.files.path_of(piece.file) == file:
                    return info.name
        return None

    def finish(self, report: LoadReport) -> None:
        self.files.finish(report)

    def close(self) -> None:
        self.files.close()

    def other_items(self) -> dict[str, Callable[[], bytes]]:
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        entries = self._saved.state_dict_metadata
        return {
            index.fqn: partial(self.chunks.read_item, stored, index.fqn)
            for index, stored in (self._saved.storage_data or {}).items()
            if isinstance(entries.get(index.fqn), BytesStorageMetadata)
        }

    def state_paths(self) -> Mapping[str, Any]:
        return state_paths(self._saved)

    def ranges(self) -> Mapping[str, Sequence[tuple[int, int]]]:
        found: dict[str, list[tuple[int, int]]] = {}
        for chunk in (chunk for tensor in self.tensors.values() for chunk in tensor.chunks):
            path = os.path.join(self.files.directory, chunk.stored.relative_path)
            found.setdefault(path, []).append((chunk.stored.offset, chunk.stored.length))
        return {path: joined(ranges, _GAP_BYTES) for path, ranges in found.items()}

    def _begin(self, tensor: DcpTensor) -> tuple[str, int]:
        """The file and the offset of a tensor's first item."""
        if not tensor.chunks:
            return self.listing, 0
        stored = tensor.chunks[0].stored
        return os.path.join(self.files.directory, stored.relative_path), stored.offset


def _warn_of_layout(tensors: Mapping[str, DcpTensor]) -> None:
    warning = misread_layout((tensor.stored_name, name) for name, tensor in tensors.items())
    if warning is not None:
        logger.warning("%s", warning)
