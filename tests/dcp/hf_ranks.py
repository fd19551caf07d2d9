"""What each process of a small gloo group does with Hugging Face checkpoints; see ranks.py."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from engine_loader import dcp

from .ranks import main
from .states import bits


def full_tensors() -> dict[str, torch.Tensor]:
    """The same on every rank. torch's consolidation refuses integers, and makes zeros of tensors without dimensions."""
    torch.manual_seed(7)
    return {
        "model.rows": torch.randn(10, 6),
        "model.columns": torch.randn(7, 12).bfloat16(),
        "model.whole": torch.randn(9).half(),
        "model.uneven": torch.randn(5, 3).double(),
        "model.few": torch.randn(1, 4),
        "model.experts": torch.randn(4, 6, 5),
        "model.eight": torch.randn(8, 16).to(torch.float8_e4m3fn),
    }


SAVED = {
    "model.rows": Shard(0),
    "model.columns": Shard(1),
    "model.uneven": Shard(0),
    "model.few": Shard(0),
    "model.experts": Shard(1),
    "model.eight": Shard(0),
}
LOADED = SAVED | {"model.rows": Shard(1), "model.columns": Shard(0), "model.experts": Shard(2), "model.whole": Shard(0)}
FILES = {name: 1 + number % 2 for number, name in enumerate(full_tensors())}


def state(world: int, placements: dict[str, Shard], *, empty: bool = False) -> dict[str, Any]:
    """The tensors as one rank has them."""
    mesh = init_device_mesh("cpu", (world,))
    tensors = {}
    for name, full in full_tensors().items():
        local = local_part(full, placements.get(name), mesh.get_local_rank(), world)
        tensors[name] = DTensor.from_local(
            torch.zeros_like(local) if empty else local,
            mesh,
            [placements.get(name, Replicate())],
            run_check=False,
            shape=full.shape,
            stride=full.stride(),
        )
    return tensors


def local_part(full: torch.Tensor, placement: Shard | None, rank: int, world: int) -> torch.Tensor:
    """What a rank has of a tensor; gloo does not scatter numbers of eight bits."""
    if placement is None:
        return full.clone()
    parts = full.chunk(world, placement.dim)
    return (parts[rank] if rank < len(parts) else full.narrow(placement.dim, 0, 0)).contiguous()


def save(rank: int, world: int, directory: Path) -> None:
    """Save by both, consolidated and not, and load each with other placements."""
    for writer in (dcp.HuggingFaceStorageWriter, torch_dcp.HuggingFaceStorageWriter):
        whose = "ours" if writer is dcp.HuggingFaceStorageWriter else "torchs"
        for kind, options in (("parts", {}), ("whole", {"enable_consolidation": True})):
            path = str(directory / f"{whose}-{kind}")
            storage = writer(path, FILES, save_distributed=True, thread_count=2, **options)
            torch_dcp.save(state(world, SAVED), storage_writer=storage)
            loaded = state(world, LOADED, empty=True)
            torch_dcp.load(loaded, storage_reader=dcp.HuggingFaceStorageReader(path))
            for name, full in full_tensors().items():
                expected = local_part(full, LOADED.get(name), rank, world)
                assert bits(loaded[name].to_local()) == bits(expected), (path, name)


if __name__ == "__main__":
    main({"save": save})
