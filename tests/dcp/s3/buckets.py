"""Saving to a bucket and loading from it, by this package and by others."""

from pathlib import Path
from typing import Any

import s3torchconnector.dcp as theirs
import torch.distributed.checkpoint as torch_dcp
from s3torchconnector import S3ClientConfig as TheirConfig

from engine_loader.dcp import S3FileSystem, S3StorageReader, S3StorageWriter
from tests.support.s3_server import S3Server

REGION = "us-east-1"
# s3torchconnector puts the bucket into the host's name otherwise, also where the host is an address.
_PATH_STYLE = TheirConfig(force_path_style=True)


def save(state: dict[str, Any], url: str, **options: Any) -> None:
    torch_dcp.save(state, storage_writer=S3StorageWriter(REGION, url, **options), no_dist=True)


def load(state: dict[str, Any], url: str, **options: Any) -> dict[str, Any]:
    torch_dcp.load(state, storage_reader=S3StorageReader(REGION, url, **options), no_dist=True)
    return state


def their_save(state: dict[str, Any], url: str, **options: Any) -> None:
    writer = theirs.S3StorageWriter(REGION, url, s3client_config=_PATH_STYLE, **options)
    torch_dcp.save(state, storage_writer=writer, no_dist=True)


def their_load(state: dict[str, Any], url: str) -> dict[str, Any]:
    reader = theirs.S3StorageReader(REGION, url, s3client_config=_PATH_STYLE)
    torch_dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def keys(url: str) -> list[str]:
    """Everything below a prefix, without the prefix."""
    import obstore
    from obstore.store import ObjectStore

    from engine_loader.sources.object_store.url import parse_object_url

    parsed = parse_object_url(url)
    store: ObjectStore = S3FileSystem(REGION).stores.client(parsed)
    listed = obstore.list(store, parsed.key or None).collect()
    return sorted(meta["path"].removeprefix(f"{parsed.key}/") for meta in listed)


def download(url: str, directory: Path) -> Path:
    """All objects below a prefix, as files."""
    files = S3FileSystem(REGION)
    for name in keys(url):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        with files.create_stream(f"{url}/{name}", "rb") as stream:
            (directory / name).write_bytes(stream.read())
    return directory


def upload(directory: Path, url: str) -> None:
    files = S3FileSystem(REGION)
    for path in directory.rglob("*"):
        if path.is_file():
            with files.create_stream(f"{url}/{path.relative_to(directory)}", "wb") as stream:
                stream.write(path.read_bytes())


def unfinished_uploads(server: S3Server, bucket: str) -> bytes:
    """What the server says about uploads that were begun and not ended."""
    return server.request("GET", f"/{bucket}?uploads")
