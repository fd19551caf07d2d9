"""Checks, before ``torch.load`` reads an item of ``torch.save``, that its records are not larger than the item."""

from __future__ import annotations

import io
import zipfile

from .torch_item import ZIP_MAGIC


def check_expansion(content: bytes) -> None:
    """Refuse a zip archive whose records have more bytes than the archive: ``torch.load`` makes all of them at once.

    ``torch.save`` does not compress. A compressed record of 143 KiB can have 143 MiB.

    Raises:
        ValueError: the records have more bytes than the archive, or its directory is damaged.
    """
    if not content.startswith(ZIP_MAGIC):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            expanded = sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(f"its archive is damaged: {error}") from None
    if expanded > len(content):
        raise ValueError(
            f"its records are compressed or overlap: {expanded} bytes in an archive of {len(content)}, "
            "which torch.save does not write"
        )
