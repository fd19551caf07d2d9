"""Converts a training checkpoint to safetensors, as on the Hugging Face hub, in bounded memory.

    python examples/convert_training.py TRAINING DESTINATION

TRAINING is a directory of torch.distributed.checkpoint, or the URL of one in an object store. b10_3fs serves a training
checkpoint as it is; convert one to hand it on. `engine-loader convert` does this on the command line.
"""

import argparse

import torch

from engine_loader import open_checkpoint
from engine_loader.conversion import convert_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("training")
    parser.add_argument("destination")
    arguments = parser.parse_args()
    done = convert_checkpoint(
        arguments.training,
        arguments.destination,
        key_mapping={r"^model\.": ""},  # from the training's names to the model's
        dtype=torch.bfloat16,
        max_shard_bytes=5_000_000_000,
    )
    print(f"{done.tensors} tensors, {done.nbytes:,} bytes, in {', '.join(file.name for file in done.files)}")
    with open_checkpoint(arguments.destination) as checkpoint:
        for name in checkpoint:
            print(name, checkpoint.info(name).dtype, list(checkpoint.info(name).shape))


if __name__ == "__main__":
    main()
