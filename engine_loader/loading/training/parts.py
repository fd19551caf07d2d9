"""Safetensors files that hold parts of tensors (DCP_SHARDING_INFO), as the metadata of one training checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...errors import CheckpointError
from ...formats.dcp_parts import saved_offsets
from ...formats.safetensors import Header, TensorInfo
from ...garbage import no_garbage_collection
from .items import JoinedParts, PartInfo
from .tensors import check_cover

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

_MAX_INT64 = 2**63 - 1
_SEVERAL_SAVES = "the files are of different saves: keep those that belong together"


@dataclass(slots=True)
class _Whole:
    """A tensor as far as its parts are known: the parts by where they begin, and where the last of them ends."""

    first: TensorInfo
    dtype: torch.dtype
    ends: list[int]
    parts: dict[tuple[int, ...], PartInfo]

    def add(self, offsets: tuple[int, ...], part: PartInfo, tensor: TensorInfo) -> None:
        if part.dtype != self.dtype or len(offsets) != len(self.ends):
            raise CheckpointError(
                f"{tensor.name!r} is {tensor.dtype} {list(tensor.shape)} here, and {self.first.dtype} "
                f"{list(self.first.shape)} in {self.first.file}",
                file=tensor.file,
                hint=_SEVERAL_SAVES,
            )
        for dim, (begin, size) in enumerate(zip(offsets, part.shape, strict=True)):
            self.ends[dim] = max(self.ends[dim], begin + size)
        before = self.parts.get(offsets)
        # Of ranks that have nothing of a tensor, several begin at its end.
        if before is not None and before.length and part.length:
            raise CheckpointError(
                f"{tensor.name!r} at {list(offsets)} is also in {before.relative_path}",
                file=tensor.file,
                hint=_SEVERAL_SAVES,
            )
        if before is None or part.length:
            self.parts[offsets] = part

    def joined(self) -> JoinedParts | None:
        """Its parts as one, where they are its rows, in order and without a hole."""
        row, rest, rows = 0, tuple(self.ends[1:]), []
        for offsets, part in sorted(self.parts.items()):
            if part.length:
                if offsets[:1] != (row,) or any(offsets[1:]) or part.shape[1:] != rest:
                    return None
                rows.append((row, part))
                row += part.shape[0]
        if not rows or row != self.ends[0]:
            return None
        first, nbytes = rows[0][1], sum(part.length for _, part in rows)
        return JoinedParts(first.relative_path, first.offset, nbytes, torch.Size(self.ends), self.dtype, tuple(rows))


def common_directory(files: Iterable[str]) -> str:
    """The directory that holds all of these files, or "" where there is none."""
    directories = {os.path.dirname(path) for path in files}
    return directories.pop() if len(directories) == 1 else ""


def metadata_of_parts(
    headers: Sequence[Header], directory: str, files_of: Mapping[str, str] | None = None, *, join_rows: bool = False
) -> Metadata:
    """What ``.metadata`` would say of these files. Its storage data are PartInfo.

    Args:
        headers: of the files.
        directory: to which the paths of the files are relative, see ``common_directory``; "": they are kept.
        files_of: name -> path of the file whose tensor counts, where several files have one of this name.
        join_rows: tensors whose parts are their rows, in order, have one chunk, which is stored at JoinedParts: torch
            then plans one read of each, and not one of each part.

    Raises:
        CheckpointError: DCP_SHARDING_INFO is wrong, or the parts of a tensor differ in their element type, overlap, or
            leave a hole.
    """
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    with no_garbage_collection():
        wholes = _wholes(headers, directory, files_of or {})
        entries: dict[str, TensorStorageMetadata] = {}
        storage: dict[MetadataIndex, PartInfo | JoinedParts] = {}
        for name, whole in wholes.items():
            joined = whole.joined() if join_rows and len(whole.parts) > 1 else None
            stored = whole.parts if joined is None else {(0,) * len(whole.ends): joined}
            chunks = []
            for offsets, part in stored.items():
                begin = torch.Size(offsets)
                chunks.append(ChunkStorageMetadata(begin, part.shape))
                storage[MetadataIndex(name, begin)] = part
            if joined is None:
                check_cover(name, whole.ends, chunks, whole.first.file)
            entries[name] = TensorStorageMetadata(TensorProperties(whole.dtype), torch.Size(whole.ends), chunks)
    return Metadata(entries, storage_data=storage)  # type: ignore[arg-type]  # the values' type is invariant


def _wholes(headers: Sequence[Header], directory: str, files_of: Mapping[str, str]) -> dict[str, _Whole]:
    wholes: dict[str, _Whole] = {}
    there = {(header.file, tensor.name) for header in headers for tensor in header.tensors} if files_of else set()
    chosen = {name: file for name, file in files_of.items() if (file, name) in there}
    for header in headers:
        path = os.path.basename(header.file) if directory else header.file
        told = saved_offsets(header)
        for tensor in header.tensors:
            if chosen and chosen.get(tensor.name, header.file) != header.file:
                continue
            dtype, sizes = tensor.as_torch()
            # torch counts these in its own elements, also where the header counts smaller ones (F4).
            offsets = (0,) * len(sizes) if told is None else told[tensor.name]
            part = PartInfo(path, tensor.offset, tensor.nbytes, torch.Size(sizes), dtype)
            whole = wholes.get(tensor.name)
            if whole is None:
                whole = wholes[tensor.name] = _Whole(tensor, dtype, [0] * len(sizes), {})
            whole.add(offsets, part, tensor)
    for name, whole in wholes.items():
        if math.prod(end or 1 for end in whole.ends) * whole.dtype.itemsize > _MAX_INT64:
            raise CheckpointError(
                f"the parts of {name!r} end at {whole.ends}, which no tensor can have", file=whole.first.file
            )
    return wholes
