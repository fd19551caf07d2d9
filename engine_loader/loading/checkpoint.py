"""The public way to read a checkpoint: ``open_checkpoint``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch

from ..errors import CheckpointError, TensorNotFoundError, TransferError
from ..formats.hf_index import ShardIndex
from ..formats.safetensors import TensorInfo
from ..formats.sharded_state import ShardRank
from ..report.load import LoadReport
from ..settings import LoaderSettings, load_settings
from ..sources.registry import make_source
from ..sources.source import Source
from ..transfer.plan import ExtentRow, extent
from .devices.cuda import Devices
from .find import OpenFiles, PathLike, is_dcp, open_files, sharded_files
from .geometry import contiguous_strides, view_extents
from .safetensors_store import Reader, no_gds_for_training
from .slices import TensorSlice
from .targets import check_target, check_targets_apart
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
            to it; or a function, or its "module:function". None: the setting of that name.
        optimizer_state: of a torch.distributed.checkpoint, also the tensors of optimizers, which are left out else.
        options: settings of the loader by name, e.g. ``threads=8`` or ``buffer_bytes="1GiB"``; they override the
            environment and the YAML file (see ``engine-loader settings``).

    Raises:
        CheckpointError: there is no checkpoint, or a header or the index is wrong; the message says which file and why.
        SettingsError: an option is unknown or has a bad value.

    Example:
        >>> with open_checkpoint("model/") as checkpoint:
        ...     for name, tensor in checkpoint.tensors():
        ...         print(name, tensor.shape)
    """
    settings = load_settings(options, extra_origin="the arguments of open_checkpoint").settings.loader
    place = torch.device(device)
    if backend == "auto":
        backend = settings.backend if files is None else "memory"
    source = make_source(backend, files, settings)
    if isinstance(path, str | os.PathLike):
        dcp = _open_dcp(source, os.fspath(path), settings, place, key_mapping, optimizer_state)
        if dcp is not None:
            if settings.transport == "gds":
                dcp.close()
                raise no_gds_for_training(os.fspath(path))
            if rank is not None or pipeline_rank:
                dcp.close()
                raise CheckpointError(
                    "this is a training checkpoint, whose tensors are whole: there are no ranks to choose from",
                    file=os.fspath(path),
                    hint="get_slice(name)[index] reads a part of a tensor",
                )
            return dcp
        wanted = None if rank is None else ShardRank(pipeline_rank, rank)
        path = sharded_files(source, os.fspath(path), wanted, settings.sharded_pattern) or path
    if key_mapping or optimizer_state:
        raise CheckpointError("key_mapping and optimizer_state go with a DCP directory, which this is not")
    return Checkpoint(open_files(source, path), source.name, settings, place)


def _open_dcp(
    source: Source,
    directory: str,
    settings: LoaderSettings,
    device: torch.device,
    key_mapping: KeyMapping | None,
    optimizer_state: bool,
) -> Checkpoint | None:
    """A torch.distributed.checkpoint; None where the path is none."""
    if not is_dcp(source, directory):
        return None
    from .training.checkpoint import DcpCheckpoint

    return DcpCheckpoint(source, directory, settings, device, key_mapping=key_mapping, optimizer_state=optimizer_state)


class Checkpoint:
    """An open checkpoint. Made by ``open_checkpoint``; its headers were read and checked.

    It may be used from several threads. ``close()``, or the end of the ``with`` block, gives back files and threads;
    tensors that were handed out stay valid.
    """

    def __init__(
        self,
        files: OpenFiles,
        source: str,
        settings: LoaderSettings,
        device: torch.device,
        devices: Devices | None = None,
    ) -> None:
        self._reader = Reader(files, source, settings, devices)
        self._device = device
        self._gds = settings.transport == "gds"
        try:
            self._infos = _by_name(files)
        except BaseException:
            self._reader.close()
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
        """Element type, shape and place of a tensor (``dtype``, ``shape``, ``file``, ``offset``, ``nbytes``).

        Raises:
            TensorNotFoundError: there is no such tensor; the message suggests the nearest names.
        """
        try:
            return self._infos[name]
        except KeyError:
            raise TensorNotFoundError.among(name, self._infos, self._reader.files.files[0].file.path) from None

    def metadata(self) -> dict[str, str]:
        """The ``__metadata__`` of all files together; where two differ, the first file's entry counts."""
        merged: dict[str, str] = {}
        for opened in reversed(self._reader.files.files):
            merged.update(opened.header.metadata)
        return merged

    def tensors(
        self, names: Iterable[str] | None = None, *, report: LoadReport | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over (name, tensor) in file order, reading ahead.

        Every tensor owns its bytes for as long as anyone holds it. Memory in use beyond what is held: at most the
        setting ``buffer_bytes``, and one block or tensor.

        Args:
            names: only these, still in file order; the rest is not read.
            report: is told what was read.

        Raises:
            TensorNotFoundError: one of ``names`` is not there.
            CheckpointError: the bytes could not be read.
            SettingsError: GPUDirect Storage was asked for and cannot be used.
        """
        infos: Iterable[TensorInfo] = self._infos.values()
        if names is not None:
            wanted = {self.info(name).name for name in names}
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
        return TensorSlice(self.info(name), self._reader, self._device)

    def load_into(self, targets: Mapping[str, torch.Tensor], *, report: LoadReport | None = None) -> None:
        """Read tensors straight into existing memory, of any strides.

        Args:
            targets: name -> tensor to fill. Element type and shape must be the checkpoint's; no two may overlap in
                memory.
            report: is told what was read.

        Raises:
            TensorNotFoundError: a name is not there.
            CheckpointError: a target does not fit, or the bytes could not be read (targets then hold unspecified
                bytes).
            SettingsError: GPUDirect Storage was asked for and cannot be used.
        """
        pairs = [(self.info(name), target) for name, target in targets.items()]
        for info, target in pairs:
            check_target(info, target)
        direct: dict[int | None, list[tuple[TensorInfo, torch.Tensor]]] = {}  # by device
        others = {}
        for info, target in pairs:
            device = self._reader.device_of(target)
            if device is None and target.device.type != "cpu":
                others[info.name] = target
            else:
                direct.setdefault(device, []).append((info, target))
        report = report or LoadReport()
        for device, group in direct.items():
            check_targets_apart(group)
            self._read(group, device)
            for info, _ in group:
                report.count_tensor(info)
        with torch.no_grad():
            for place in {self._staging(target) for target in others.values()}:
                wanted = [info for info in self._infos.values() if info.name in others]
                wanted = [info for info in wanted if self._staging(others[info.name]) == place]
                for name, tensor in self._reader.stream_to(place, wanted, report):
                    others[name].copy_(tensor)
        self._reader.finish(report)

    def close(self) -> None:
        """Cancel what is in flight; give back files and threads. Safe to call twice."""
        self._reader.close()

    def _staging(self, target: torch.Tensor) -> torch.device:
        """Where a target's bytes are streamed to that are then copied."""
        return target.device if self._gds else self._device

    def _stream(self, infos: Iterable[TensorInfo], report: LoadReport) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._reader.stream_to(self._device, infos, report)
        self._reader.finish(report)

    def _read(self, pairs: Sequence[tuple[TensorInfo, torch.Tensor]], device: int | None) -> None:
        """Read whole tensors into the memory of one device, or (None) of the CPU."""
        extents: list[ExtentRow] = []
        for info, target in pairs:
            number, address = self._reader.file_number(info), target.data_ptr()
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
            self._reader.read(extents, [target for _, target in pairs], device)
        except TransferError as error:
            raise self._reader.named(error) from error


def check_index(index: ShardIndex, files: OpenFiles) -> dict[str, TensorInfo]:
    """The tensors of ``files`` that ``index`` lists, by name.

    Raises:
        CheckpointError: the index lists a tensor that its file does not have.
    """
    here = {(info.file, info.name): info for info in files.tensors}
    elsewhere = {info.name: info for info in files.tensors}
    infos: dict[str, TensorInfo] = {}
    for name, shard in index.weight_map.items():
        info = here.get((index.path_of(shard), name))
        if info is None:
            found = f"it is in {elsewhere[name].file}" if name in elsewhere else None
            raise CheckpointError(
                f"the index puts {name!r} into {shard!r}, which does not have it",
                file=index.file,
                hint=found or "index and shards are of different checkpoints, or a shard is damaged",
            )
        infos[name] = info
    return infos


def _by_name(files: OpenFiles) -> dict[str, TensorInfo]:
    """All tensors by name, in file order."""
    listed = check_index(files.index, files) if files.index is not None else {}
    infos: dict[str, TensorInfo] = {}
    for info in files.tensors:
        if listed.get(info.name, info) is not info:
            continue  # of two with one name, that counts which the index names
        if info.name in infos:
            raise CheckpointError(
                f"{info.name!r} is also in {infos[info.name].file}",
                file=info.file,
                hint="it is not clear which one counts: give the list of files that belong together",
            )
        infos[info.name] = info
    return infos
