"""What each process of a small gloo group does: run as ``python -m tests.dcp.ranks JOB RANK WORLD DIRECTORY``.

``run`` starts such a group, of this module or of another one with jobs of its own.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from engine_loader import dcp
from engine_loader.dcp import SerializationFormat


def full_tensors() -> dict[str, torch.Tensor]:
    """The same on every rank."""
    torch.manual_seed(5)
    return {
        "model.rows": torch.randn(10, 6),
        "model.columns": torch.randn(7, 12).bfloat16(),
        "model.replicated": torch.arange(9),
        "model.uneven": torch.randn(5, 3),
        "optimizer.state.rows.exp_avg": torch.randn(10, 6),
    }


PLACEMENTS = {
    "model.rows": Shard(0),
    "model.columns": Shard(1),
    "model.replicated": Replicate(),
    "model.uneven": Shard(0),
    "optimizer.state.rows.exp_avg": Shard(0),
}


def state(world: int, *, empty: bool = False) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world,))
    tensors = {
        name: distribute_tensor(torch.zeros_like(full) if empty else full, mesh, [PLACEMENTS[name]])
        for name, full in full_tensors().items()
    }
    return {**tensors, "step": 0 if empty else 12}


def is_right(loaded: dict[str, Any]) -> bool:
    """Whether every rank's shards are what they should be."""
    full = full_tensors()
    whole = {name: value.full_tensor() for name, value in loaded.items() if isinstance(value, DTensor)}
    return loaded["step"] == 12 and all(torch.equal(whole[name], full[name]) for name in full)


def save(rank: int, world: int, directory: Path) -> None:
    mine = state(world)
    torch_dcp.save(mine, storage_writer=dcp.FileSystemWriter(directory / "ours"))
    safetensors = dcp.FileSystemWriter(directory / "safetensors", serialization_format=SerializationFormat.SAFETENSORS)
    torch_dcp.save(mine, storage_writer=safetensors)
    torch_dcp.save(mine, storage_writer=torch_dcp.FileSystemWriter(directory / "torchs"))
    torch_dcp.async_save(mine, storage_writer=dcp.FileSystemWriter(directory / "async")).result()
    # Over a checkpoint that is there, by all ranks at once.
    torch_dcp.save(mine, storage_writer=dcp.FileSystemWriter(directory / "ours"))
    load(rank, world, directory)
    # Each rank for itself, with metadata of its own.
    torch_dcp.save(mine, storage_writer=dcp.FileSystemWriter(directory / "alone"), use_collectives=False)
    loaded = state(world, empty=True)
    torch_dcp.load(loaded, storage_reader=dcp.FileSystemReader(directory / "alone"))
    assert is_right(loaded), "alone"


def load(rank: int, world: int, directory: Path) -> None:
    for name in ("ours", "safetensors", "torchs", "async"):
        loaded = state(world, empty=True)
        torch_dcp.load(loaded, storage_reader=dcp.FileSystemReader(directory / name))
        assert is_right(loaded), name
    loaded = state(world, empty=True)
    torch_dcp.load(loaded, storage_reader=torch_dcp.FileSystemReader(directory / "ours"))
    assert is_right(loaded), "torch's reader"


Job = Callable[[int, int, Path], None]


def main(jobs: Mapping[str, Job]) -> None:
    """Be one process of a group."""
    job, rank, world, directory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rendezvous = f"file://{directory}/rendezvous-{job}-{world}"
    dist.init_process_group("cpu:gloo", init_method=rendezvous, rank=rank, world_size=world)
    jobs[job](rank, world, directory)
    dist.barrier()
    dist.destroy_process_group()


def run(job: str, world: int, directory: Path, *, module: str = "tests.dcp.ranks") -> None:
    """Start a group of processes, and wait until all have ended well."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, job, str(rank), str(world), str(directory)],
            cwd=Path(__file__).parent.parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


if __name__ == "__main__":
    main({"save": save, "load": load})
