"""Reads a checkpoint by USRBIO without a 3FS cluster: an emulator of 3FS's library serves a local directory.

    python examples/emulate_3fs.py DIRECTORY

It needs a C compiler. On a machine with 3FS, HF3FS_LIB_DIR names the directory of libhf3fs_api_shared.so instead, and
nothing else changes. `engine-loader emulate-3fs DIRECTORY` does this for vLLM and SGLang.
"""

import argparse
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine_loader import open_checkpoint
from engine_loader.threefs_emulator import build_emulator


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    mount = parser.parse_args().directory.absolute()
    library = build_emulator(mount / ".3fs-emulator")
    os.environ["HF3FS_LIB_DIR"] = str(library.parent)
    os.environ["HF3FS_EMULATOR_MOUNT"] = str(mount)
    save_file({"weight": torch.arange(1 << 20, dtype=torch.float32)}, mount / "model.safetensors")

    # "auto" (the default) reads by USRBIO what 3FS says is its own; "usrbio" is an error where that is not possible.
    with open_checkpoint(mount / "model.safetensors", backend="usrbio", usrbio_rings=1) as checkpoint:
        weight = checkpoint.get_tensor("weight")
    print(f"read by USRBIO: {weight.nbytes:,} bytes, the last value is {weight[-1].item():g}")


if __name__ == "__main__":
    main()
