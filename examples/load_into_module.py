"""Loads weights into a module of your own, straight into its parameters: no copy of the weights exists beside them.

    python examples/load_into_module.py FILE

FILE is written first, as a stand-in for a checkpoint of yours.
"""

import argparse

import torch
from safetensors.torch import save_file
from torch import nn

from engine_loader import ask_for_huge_pages, open_checkpoint


def make_module() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    arguments = parser.parse_args()
    trained = make_module()
    save_file(trained.state_dict(), arguments.file)

    with torch.device("meta"):  # shapes only: parameters that are filled from a file need no initial values
        module = make_module()
    module.to_empty(device="cpu")
    ask_for_huge_pages(module.parameters())  # large parameters are filled faster in huge pages
    with open_checkpoint(arguments.file) as checkpoint:
        checkpoint.load_into(module.state_dict())  # dtype and shape are checked, strides may be any

    x = torch.ones(1, 64)
    print(f"{len(module.state_dict())} tensors loaded")
    print(f"same output as the trained module: {torch.equal(module(x), trained(x))}")


if __name__ == "__main__":
    main()
