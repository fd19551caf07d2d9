"""The public way to read a checkpoint: ``open_checkpoint``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch

from ..errors import CheckpointError, TensorNotFoundError, TransferError
from ..formats.safetensors import TensorInfo
from ..formats.sharded_state import ShardRank
from ..report.load_report import LoadReport
from ..settings import load_settings
from ..sources.registry import make_source
from ..transfer.plan import ExtentRow, extent
from .devices.chosen import usable_device
from .find import Found, PathLike, SafetensorsFiles, ShardedState, TrainingCheckpoint, find_checkpoint
from .geometry import contiguous_strides, view_extents
from .open_store import open_store
from .slices import TensorSlice
from .store import TensorStore
from .targets import check_target, check_targets_apart

if TYPE_CHECKING:
    from .training.key_mapping import KeyMapping


def open_checkpoint(
    path: PathLike | Sequence[PathLike],
    *,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    files: Mapping[str, bytes | bytearray | memoryview] | None = None,
    rank: int | None = None,
    pipeline_rank: int = 0,
    key_mapping: KeyMapping | None = None,
    optimizer_state: bool = False,
    **options: Any,
) -> Checkpoint:
    """Open a checkpoint for reading; use it as a context manager.

    Args:
        path: a .safetensors file, a Hugging Face directory with or without model.safetensors.index.json, the directory
            of a sharded_state checkpoint, that of a torch.distributed.checkpoint (with .metadata), or a list of files.
        device: where tensors are put.
        backend: "auto", "posix" (mounted file systems), "usrbio" (3FS past its mount), "object_store" or "memory".
        files: for the memory backend, path -> content.
        rank: of a sharded_state checkpoint, whose part (the tensor-parallel rank); needed where it has several. An
            error for every other one: there, ``get_slice`` reads a part.
        pipeline_rank: the same for its pipeline stages.
        key_mapping: of a torch.distributed.checkpoint, from the training's names to those that are wanted: regular
            expression -> replacement, of which, as transformers does, the first one that is found in a name is applied
            to it; or a function, or its "module:function"; or rules that also reorder, cut and join tensors, or the
            name of a layout (docs/dcp.md). None: the setting of that name.
        optimizer_state: of a torch.distributed.checkpoint, also what is not the model's, which is left out else: the
            tensors of optimizers, averaged copies (EMA), states of random generators, ``_extra_state``.
        options: settings of the loader by name, e.g. ``threads=8`` or ``buffer_bytes="1GiB"``; they override the
            environment and the YAML file (see ``engine-loader settings``).

    Raises:
        CheckpointError: there is no checkpoint, or a header or the index is wrong; the message says which file and why.
        SettingsError: an option is unknown or has a bad value, or torch has no such device here.

    Example:
        >>> with open_checkpoint("model/") as checkpoint:
        ...     for name, tensor in checkpoint.tensors():
        ...         print(name, tensor.shape)
    """
    settings = load_settings(options, extra_origin="the arguments of open_checkpoint").settings.loader
    put_on = usable_device(device)
    if backend == "auto":
        backend = settings.backend if files is None else "memory"
    source = make_source(backend, files, settings)
    found = find_checkpoint(source, path, sharded_pattern=settings.sharded_pattern)
    found = _of_rank(found, None if rank is None else ShardRank(pipeline_rank, rank), pipeline_rank)
    store = open_store(source, found, settings, key_mapping=key_mapping, optimizer_state=optimizer_state)
    return Checkpoint(store, put_on)


def _of_rank(found: Found, rank: ShardRank | None, pipeline_rank: int) -> SafetensorsFiles | TrainingCheckpoint:
    """One rank's part of what was found, where it has parts.

    Raises:
        CheckpointError: there are several ranks and none was named, not this one, or none to choose from.
    """
    match found:
        case ShardedState():
            return found.of_rank(rank)
        case TrainingCheckpoint(directory) if rank is not None or pipeline_rank:
            raise CheckpointError(
                "this is a training checkpoint, whose tensors are whole: there are no ranks to choose from",
                file=directory,
                hint="get_slice(name)[index] reads a part of a tensor",
            )
        case SafetensorsFiles(directory=str(directory)) if rank is not None:
            raise CheckpointError(
                "this is not a sharded_state checkpoint, so there are no ranks to choose from", file=directory
            )
    return found


class Checkpoint:
    """An open checkpoint. Made by ``open_checkpoint``; its headers or its metadata were read and checked.

    It may be used from several threads. ``close()``, or the end of the ``with`` block, gives back files and threads;
    tensors that were handed out stay valid.

    Args:
        store: its tensors, which it closes.
        device: where tensors are put.
    """

    def __init__(self, store: TensorStore, device: torch.device) -> None:
        self._store = store
        self._device = device
        try:
            self._infos = store.by_name()
        except BaseException:
            store.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def keys(self) -> list[str]:
        """The names of all tensors, in file order."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Element type, shape and location of a tensor (``dtype``, ``shape``, ``file``, ``offset``, ``nbytes``).

        Of a training checkpoint, file and offset are those of the first chunk.

        Raises:
            TensorNotFoundError: there is no such tensor; the message suggests the nearest names.
        """
        return self._store.located([self._known(name)])[0]

    def metadata(self) -> dict[str, str]:
        """The ``__metadata__`` of all files together; where two differ, the first file's entry counts."""
        return self._store.metadata()

    def tensors(
        self, names: Iterable[str] | None = None, *, report: LoadReport | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over (name, tensor) in file order, reading ahead.

        Every tensor owns its bytes for as long as anyone holds it. Memory in use beyond what is held: at most the
        setting ``buffer_bytes``, and one block or tensor.

        Args:
            names: only these, still in file order; the rest is not read.
            report: counts what is read.

        Raises:
            TensorNotFoundError: one of ``names`` is not there.
            CheckpointError: the bytes could not be read.
            SettingsError: GPUDirect Storage was asked for and cannot be used.
        """
        infos: Iterable[TensorInfo] = self._infos.values()
        if names is not None:
            wanted = {self._known(name).name for name in names}
            infos = [info for info in infos if info.name in wanted]
        return self._stream(infos, report or LoadReport())

    def get_tensor(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            TensorNotFoundError: there is no such tensor.
            CheckpointError: the bytes could not be read.
        """
        return self.get_slice(name)[...]

    def get_slice(self, name: str) -> TensorSlice:
        """A part of a tensor: ``get_slice(name)[index]`` reads only the bytes that the index needs.

        The index is torch's: integers, slices, ``...``, None, lists or tensors of indices, masks.

        Raises:
            TensorNotFoundError: there is no such tensor.
        """
        return TensorSlice(self.info(name), self._store, self._device)

    def load_into(self, targets: Mapping[str, torch.Tensor], *, report: LoadReport | None = None) -> None:
        """Read tensors straight into existing memory, of any strides.

        Args:
            targets: name -> tensor to fill. Element type and shape must be the checkpoint's; no two may overlap in
                memory.
            report: counts what is read.

        Raises:
            TensorNotFoundError: a name is not there.
            CheckpointError: a target does not fit, or the bytes could not be read (targets then hold unspecified
                bytes).
            SettingsError: GPUDirect Storage was asked for and cannot be used.
        """
        infos = self._store.located([self._known(name) for name in targets])
        by_device: dict[int | None, list[tuple[TensorInfo, torch.Tensor]]] = {}
        copied: dict[str, torch.Tensor] = {}  # streamed, and copied by torch
        for info, target in zip(infos, targets.values(), strict=True):
            check_target(info, *self._store.dtype_and_shape(info), target)
        for info, target in zip(infos, targets.values(), strict=True):
            device = self._store.device_of(target)
            if device is not None or target.device.type == "cpu":
                by_device.setdefault(device, []).append((info, target))
            if (device is None and target.device.type != "cpu") or not self._store.has_extents(info):
                copied[info.name] = target
        report = report or LoadReport()
        for device, group in by_device.items():
            check_targets_apart(group)
            self._read([pair for pair in group if pair[0].name not in copied] if copied else group, device, report)
        self._copy([info for info in infos if info.name in copied], copied, report)
        self._store.finish(report)

    def close(self) -> None:
        """Cancel what is in flight; give back files and threads. Safe to call twice."""
        self._store.close()

    def _known(self, name: str) -> TensorInfo:
        try:
            return self._infos[name]
        except KeyError:
            lacking = self._store.lacking.get(name)
            if lacking is not None:
                raise TensorNotFoundError(lacking.message, file=lacking.file, hint=lacking.hint) from None
            raise TensorNotFoundError.among(name, self._infos, self._store.listing) from None

    def _stream(self, infos: Iterable[TensorInfo], report: LoadReport) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._store.stream(infos, report, self._device)
        self._store.finish(report)

    def _copy(self, infos: Sequence[TensorInfo], targets: Mapping[str, torch.Tensor], report: LoadReport) -> None:
        """Stream tensors to the staging device of each target, and copy them from there."""
        by_staging: dict[torch.device, set[str]] = {}
        for info in infos:
            by_staging.setdefault(self._store.staging(targets[info.name]), set()).add(info.name)
        for device, names in by_staging.items():
            in_order = [info for info in self._infos.values() if info.name in names]
            with torch.no_grad():
                for name, tensor in self._store.stream(in_order, report, device):
                    targets[name].copy_(tensor)

    def _read(self, pairs: Sequence[tuple[TensorInfo, torch.Tensor]], device: int | None, report: LoadReport) -> None:
        """Read whole tensors into the memory of one device, or (None) of the CPU."""
        extents: list[ExtentRow] = []
        for info, target in pairs:
            number, address = self._store.file_number(info), target.data_ptr()
            if target.is_contiguous():
                extents.append(extent(number, info.offset, info.nbytes, address))
                continue
            extents += view_extents(
                number,
                info.offset,
                target.dtype.itemsize,
                target.shape,
                src_strides=contiguous_strides(target.shape),
                dst_strides=target.stride(),
                address=address,
            )
        try:
            self._store.read(extents, [target for _, target in pairs], device)
        except TransferError as error:
            raise self._store.named(error) from error
        for info, _ in pairs:
            report.count_tensor(info)
