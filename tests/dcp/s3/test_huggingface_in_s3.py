"""Hugging Face checkpoints in a bucket, through dcp.save and dcp.load."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

from engine_loader import dcp, open_checkpoint
from engine_loader.dcp import S3ClientConfig
from tests.support.s3_server import S3Server

from ..states import blank, same
from .buckets import REGION, download, keys


@pytest.mark.parametrize("consolidated", [False, True])
def test_what_is_saved_is_loaded(on_s3: S3Server, tmp_path: Path, *, consolidated: bool) -> None:
    on_s3.make_bucket("hub")
    url = f"s3://hub/{'whole' if consolidated else 'plain'}"
    state = {"a": torch.randn(40, 30), "b": torch.randn(7).bfloat16(), "c": torch.arange(5), "d": torch.tensor(2.5)}
    options = {"save_distributed": True, "enable_consolidation": True, "thread_count_consolidation": 2}
    writer = dcp.HuggingFaceStorageWriter(
        url,
        {"a": 1, "b": 2, "c": 2, "d": 2},
        region=REGION,
        s3client_config=S3ClientConfig(),
        **(options if consolidated else {}),  # type: ignore[arg-type]
    )
    torch_dcp.save(state, storage_writer=writer, no_dist=True)
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    parts = [f"sharded/shard-00001-{name}" for name in files[:2]] if consolidated else []
    assert keys(url) == [*files, *parts]
    loaded = blank(state)
    torch_dcp.load(loaded, storage_reader=dcp.HuggingFaceStorageReader(url, region=REGION), no_dist=True)
    assert same(state, loaded)
    local = blank(state)
    reader = torch_dcp.HuggingFaceStorageReader(str(download(url, tmp_path)))
    torch_dcp.load(local, storage_reader=reader, no_dist=True)
    assert same(state, local)
    if consolidated:
        with open_checkpoint(f"{url}/sharded") as checkpoint:
            assert same(state, dict(sorted(checkpoint.tensors())))
