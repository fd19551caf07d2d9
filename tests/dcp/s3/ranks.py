"""What each process of a group does with a bucket: run as ``python -m tests.dcp.s3.ranks JOB RANK WORLD DIRECTORY``.

The bucket's name is that of the directory; the server is that of the environment.
"""

from pathlib import Path
from typing import Any

import s3torchconnector.dcp as theirs
import torch.distributed.checkpoint as torch_dcp
from s3torchconnector import S3ClientConfig as TheirConfig

from engine_loader import dcp
from tests.support.object_stores import ON_RADOSGW

from ..ranks import is_right, main, state

REGION = "us-east-1"
THEIRS = TheirConfig(force_path_style=True)
# Ceph 16 sends no ETag when an upload in parts is completed, without which s3torchconnector's writer gives up.
NAMES = ("plain", "hex", "async") if ON_RADOSGW else ("plain", "hex", "async", "theirs")


def url_of(directory: Path, name: str) -> str:
    return f"s3://{directory.name}/{name}"


def save(rank: int, world: int, directory: Path) -> None:
    mine = state(world)

    def write(name: str, **options: Any) -> dcp.S3StorageWriter:
        return dcp.S3StorageWriter(REGION, url_of(directory, name), **options)

    torch_dcp.save(mine, storage_writer=write("plain"))
    torch_dcp.save(mine, storage_writer=write("hex", prefix_strategy=dcp.HexPrefixStrategy(epoch_num=3)))
    torch_dcp.async_save(mine, storage_writer=write("async", prefix_strategy=dcp.BinaryPrefixStrategy())).result()
    # Over a checkpoint that is there, by all ranks at once.
    torch_dcp.save(mine, storage_writer=write("hex", prefix_strategy=dcp.HexPrefixStrategy(epoch_num=3)))
    # Each rank for itself, with metadata of its own.
    torch_dcp.save(mine, storage_writer=write("alone"), use_collectives=False)
    if "theirs" in NAMES:
        writer = theirs.S3StorageWriter(REGION, url_of(directory, "theirs"), s3client_config=THEIRS)
        torch_dcp.save(mine, storage_writer=writer)
    load(rank, world, directory)
    loaded = state(world, empty=True)
    torch_dcp.load(loaded, storage_reader=dcp.S3StorageReader(REGION, url_of(directory, "alone")))
    assert is_right(loaded), "alone"


def load(rank: int, world: int, directory: Path) -> None:
    for name in NAMES:
        loaded = state(world, empty=True)
        torch_dcp.load(loaded, storage_reader=dcp.S3StorageReader(REGION, url_of(directory, name)))
        assert is_right(loaded), name
    loaded = state(world, empty=True)
    reader = theirs.S3StorageReader(REGION, url_of(directory, "hex"), s3client_config=THEIRS)
    torch_dcp.load(loaded, storage_reader=reader)
    assert is_right(loaded), "s3torchconnector's reader"


if __name__ == "__main__":
    main({"save": save, "load": load})
