"""Saves a training and resumes it: torch.distributed.checkpoint with the storages of this package.

    python examples/save_and_load_training.py DIRECTORY

In S3, the storages are S3StorageWriter("us-east-1", "s3://bucket/run/step-3") and S3StorageReader; planners,
resharding and dcp.async_save are torch's own. See docs/dcp.md.
"""

import argparse
import warnings
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from engine_loader.dcp import FileSystemReader, FileSystemWriter


class Training:
    """A module with its optimizer and the number of steps that were made."""

    def __init__(self) -> None:
        self.module = nn.Linear(32, 32)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.01)
        self.steps = 0

    def step(self) -> float:
        loss = self.module(torch.ones(4, 32)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        module, optimizer = get_state_dict(self.module, self.optimizer)
        return {"model": module, "optimizer": optimizer, "steps": self.steps}

    def resume(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.module, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.steps = state["steps"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is")  # one process, no process group

    training = Training()
    for _ in range(3):
        training.step()
    # Where a checkpoint is already, it stays whole until the new one is complete.
    dcp.save(training.state(), storage_writer=FileSystemWriter(arguments.directory))

    resumed = Training()
    state = resumed.state()  # dcp.load fills its tensors in place
    dcp.load(state, storage_reader=FileSystemReader(arguments.directory))
    resumed.resume(state)
    print(f"resumed after step {resumed.steps}")
    print(f"the next losses are equal: {training.step() == resumed.step()}")


if __name__ == "__main__":
    main()
