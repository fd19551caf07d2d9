"""DCP_SHARDING_INFO: where in whole tensors the tensors of a safetensors file belong.

torch's HuggingFaceStorageWriter puts it into ``__metadata__`` of each file, as JSON (torch 2.13,
``torch/distributed/checkpoint/filesystem.py``): ``{name: {"saved_offsets": [first element per dimension]}}``. The size
of the whole tensor is nowhere: it is where its parts end.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import CheckpointError
from .safetensors import Header

SHARDING_INFO = "DCP_SHARDING_INFO"
METADATA_NAME = ".metadata"
"""The file by which the directory of a torch.distributed.checkpoint is known. It has its name here, for who only looks:
what reads it (dcp_metadata.py) costs an import of its own."""
_OFFSETS = "saved_offsets"
_PART_NAME = re.compile(r"shard-\d{5,}-model-\d{5,}-of-\d{5,}\.safetensors")
_MAX_INT64 = 2**63 - 1
_SHOWN = 100
_COPY_AGAIN = "the file is damaged: copy it again"


def saved_offsets(header: Header) -> Mapping[str, tuple[int, ...]] | None:
    """Of each tensor of a file, where in the whole tensor it begins, in elements as the file's header counts them.

    None where the file does not say: its tensors are whole.

    Raises:
        CheckpointError: what it says is no JSON of this form, lacks a tensor, or no tensor can be there.
    """
    text = header.metadata.get(SHARDING_INFO)
    if text is None:
        return None
    try:
        parsed: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(header, f"is not valid JSON: {str(error)[:_SHOWN]}") from None
    if not isinstance(parsed, dict):
        raise _wrong(header, "is not an object")
    found: dict[str, tuple[int, ...]] = {}
    for tensor in header.tensors:
        try:
            offsets = parsed[tensor.name][_OFFSETS]
        except (KeyError, TypeError):
            offsets = None
        if not isinstance(offsets, list) or any(type(number) is not int for number in offsets):
            raise _wrong(header, f"has no list of {_OFFSETS} for {tensor.name[:_SHOWN]!r}")
        fits = len(offsets) == len(tensor.shape)
        for begin, size in zip(offsets, tensor.shape, strict=False):
            fits = fits and 0 <= begin <= _MAX_INT64 - size
        if not fits:
            raise _wrong(
                header,
                f"puts {tensor.name[:_SHOWN]!r} of shape {list(tensor.shape)} at {str(offsets)[:_SHOWN]}",
            )
        found[tensor.name] = tuple(offsets)
    return found


def are_parts(headers: Sequence[Header]) -> bool:
    """Whether the tensors of these files are parts that must be put together.

    So it is where torch's HuggingFaceStorageWriter wrote the files of several ranks: by the names that it gives them,
    by a tensor that is in several of them, or by one that does not begin where its whole begins.

    Raises:
        CheckpointError: as ``saved_offsets``.
    """
    told = [header for header in headers if SHARDING_INFO in header.metadata]
    if not told:
        return False
    if any(is_part_name(header.file.rpartition("/")[2]) for header in told):
        return True
    return _stand_twice(told) or any(any(map(any, (saved_offsets(header) or {}).values())) for header in told)


def is_part_name(name: str) -> bool:
    """Whether torch's HuggingFaceStorageWriter gives this name to a file with a rank's parts."""
    return _PART_NAME.fullmatch(name) is not None


def _stand_twice(headers: Iterable[Header]) -> bool:
    counts = Counter(tensor.name for header in headers for tensor in header.tensors)
    return max(counts.values(), default=0) > 1


def _wrong(header: Header, what: str) -> CheckpointError:
    return CheckpointError(f"{SHARDING_INFO} in the header {what}", file=header.file, hint=_COPY_AGAIN)
