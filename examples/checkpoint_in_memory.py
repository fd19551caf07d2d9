"""Opens a checkpoint that is in memory, e.g. one that arrived over a network: no file is written.

    python examples/checkpoint_in_memory.py

`files` names the contents as paths, so an index, several shards and `open_checkpoint("model")` work as on a disk.
"""

import torch
from safetensors.torch import save

from engine_loader import open_checkpoint


def receive() -> dict[str, bytes]:
    """Stands for whatever brings the bytes: path -> content."""
    layers = [{f"layers.{number}.weight": torch.full((4, 8), float(number))} for number in range(2)]
    return {f"model/layer-{number}.safetensors": save(layer) for number, layer in enumerate(layers)}


def main() -> None:
    with open_checkpoint("model", files=receive()) as checkpoint:
        for name, tensor in checkpoint.tensors():
            print(f"{name}: {list(tensor.shape)}, mean {tensor.mean().item():g}")


if __name__ == "__main__":
    main()
