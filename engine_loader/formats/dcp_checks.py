"""Checks of single values in the metadata of a DCP checkpoint; each raises an error that says what is wrong."""

from __future__ import annotations

import operator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import CheckpointError
from .dcp_records import FieldsRecord, SizeRecord, short

if TYPE_CHECKING:
    import torch

DAMAGED = "the file is damaged or was not written completely: copy the checkpoint again"
_MAX_INT64 = 2**63 - 1


class MetadataChecks:
    """Checks of the values of one file; every method raises CheckpointError with the file's path.

    Args:
        file: the path of the file, for messages.
    """

    def __init__(self, file: str) -> None:
        self._file = file

    def refuse(self, what: str) -> NoReturn:
        """Raise the error for a file of which ``what`` is wrong."""
        raise CheckpointError(f"the metadata is wrong: {what}", file=self._file, hint=DAMAGED)

    def instance(self, value: Any, kind: Any, what: str) -> Any:
        """The value, if it is of this type (or one of a tuple of types); a bool is no int, and a record no list."""
        if not isinstance(value, kind) or isinstance(value, (bool, FieldsRecord)):
            self.refuse(f"{what} is {short(value)}")
        return value

    def natural(self, value: Any, what: str) -> int:
        """The value, if it is an integer from 0 to the largest of 64 bits."""
        if type(value) is not int or not 0 <= value <= _MAX_INT64:
            self.refuse(f"{what} is {short(value)}")
        return value

    def fields(self, record: Any, kind: type[FieldsRecord], name: str) -> dict[str, Any]:
        """The fields of a record of this kind, by their names."""
        if not isinstance(record, kind):
            self.refuse(f"there is {short(record)} where a {name} is expected")
        state = record[-1] if record and record[-1] is not None else {}
        if not isinstance(state, dict):
            self.refuse(f"a {name} has no fields")
        return state

    def size(self, value: Any) -> SizeRecord:
        """The value, if it is a ``torch.Size`` of a tensor that can exist."""
        if type(value) is not SizeRecord:
            self.refuse(f"{short(value)} is not a size")
        elements = 1
        for number in value:
            if type(number) is not int or number < 0:
                self.refuse(f"a dimension is {short(number)}")
            elements *= number or 1
        if elements > _MAX_INT64:
            self.refuse(f"the size {list(value)} is too large")
        return value

    def within_tensor(self, name: str, offsets: torch.Size, sizes: torch.Size, whole: torch.Size) -> None:
        """Refuse a chunk of the tensor ``name`` that is not within the tensor."""
        alike = len(offsets) == len(sizes) == len(whole)
        if not alike or not all(map(operator.le, map(operator.add, offsets, sizes), whole)):
            self.refuse(
                f"a chunk of {short(name)} at {list(offsets)} of size {list(sizes)} "
                f"is not within the tensor's {list(whole)}"
            )

    def file_name(self, path: str) -> None:
        """Refuse the path of a file that is not within the checkpoint's directory."""
        if not path:
            self.refuse("the file of an item has no name")
        if "\0" in path:
            self.refuse(f"an item lies in {short(path)}, which has a null character and is not a file's name")
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            self.refuse(f"an item lies in {short(path)}, which is not within the checkpoint's directory")
