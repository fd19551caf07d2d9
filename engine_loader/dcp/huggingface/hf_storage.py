"""What the reader and the writer of Hugging Face checkpoints share: directories, or prefixes of object stores."""

from __future__ import annotations

import os
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

from ...sources.registry import is_remote
from ..s3_config import AnyClientConfig
from ..s3_file_system import S3FileSystem


class HuggingFaceStorage:
    """Where a checkpoint lies: in a directory, or below a URL of an object store."""

    fs: FileSystem | S3FileSystem

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """True for a URL of an object store, and for a directory that exists or can be made."""
        if is_remote(os.fspath(checkpoint_id)):
            return S3FileSystem.validate_checkpoint_id(checkpoint_id)
        return FileSystem.validate_checkpoint_id(checkpoint_id)


def file_system_of(
    path: str | os.PathLike[str], region: str, config: AnyClientConfig | None, options: dict[str, Any]
) -> S3FileSystem | None:
    """The file system of objects where ``path`` is a URL; None: it is a directory.

    Raises:
        CheckpointError: obstore is not installed, or the URL is no valid one.
        SettingsError: an option is unknown or has a bad value.
    """
    if not is_remote(os.fspath(path)):
        return None
    return S3FileSystem(region, s3client_config=config, **options)
