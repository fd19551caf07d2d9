"""Streams a checkpoint's tensors to a GPU, reading ahead in bounded memory; to the CPU where there is no GPU.

    python examples/stream_to_device.py MODEL

MODEL is a .safetensors file, a Hugging Face directory, a training checkpoint, or the URL of one in an object store.
"""

import argparse
from collections import Counter

import torch

from engine_loader import open_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("there is no GPU here: streaming to the CPU")
    nbytes = Counter[torch.dtype]()
    with open_checkpoint(arguments.model, device=device, buffer_bytes="256MiB") as checkpoint:
        for _name, tensor in checkpoint.tensors():  # in file order; each tensor owns its bytes
            nbytes[tensor.dtype] += tensor.nbytes
        print(f"{len(checkpoint)} tensors on {device}")
    for dtype, size in nbytes.items():
        print(f"{dtype}: {size:,} bytes")


if __name__ == "__main__":
    main()
