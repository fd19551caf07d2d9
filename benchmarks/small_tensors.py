"""What a tensor costs beyond its bytes: 100,000 tensors of 4 to 64 KiB, as in large mixture-of-experts models.

    python -m benchmarks.small_tensors

The time of plain reads of the same files into one buffer is taken off; the rest is divided by the number of tensors.
"""

import json
import statistics
import struct
import sys
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.arguments import parser_of
from engine_loader import open_checkpoint
from engine_loader.bench.plain_reads import read_plainly
from engine_loader.bench.workload import Workload
from engine_loader.formats.safetensors import TensorInfo

SIZES = (4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10)


def write(directory: Path, tensors: int, files: int) -> None:
    directory.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, 1 << 20, np.uint8).tobytes()
    for number in range(files):
        header, end = {}, 0
        for index in range(number * tensors // files, (number + 1) * tensors // files):
            nbytes = SIZES[index % len(SIZES)]
            name = f"model.layers.{index // 512}.mlp.experts.{index % 512}.weight"
            header[name] = {"dtype": "BF16", "shape": [nbytes // 128, 64], "data_offsets": [end, end + nbytes]}
            end += nbytes
        text = json.dumps(header).encode()
        with (directory / f"model-{number:05}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for begin in range(0, end, len(noise)):
                file.write(noise[: min(len(noise), end - begin)])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tensors", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    arguments = parser.parse_args()
    path = arguments.dir / f"small-{arguments.tensors}"
    if not path.exists():
        write(path, arguments.tensors, files=4)
    workload = Workload.of(path)
    memory = torch.zeros(workload.nbytes, dtype=torch.uint8)
    targets: dict[str, torch.Tensor] = {}
    whole: dict[str, torch.Tensor] = {}
    place = 0
    for info in workload.tensors:
        targets[info.name] = memory[place : place + info.nbytes].view(torch.bfloat16).view(info.shape)
        place += info.nbytes
    # The limit: each file's bytes as one tensor.
    runs: list[TensorInfo] = []
    place = 0
    for file in workload.files:
        held = [info for info in workload.tensors if info.file == file]
        nbytes = sum(info.nbytes for info in held)
        runs.append(TensorInfo(file, "U8", (nbytes,), file, held[0].offset, nbytes))
        whole[file] = memory[place : place + nbytes]
        place += nbytes
    plain = Workload(path, workload.files, tuple(runs))
    with open_checkpoint(path) as checkpoint:

        def stream() -> None:
            for _ in checkpoint.tensors():
                pass

        work = {
            "plain": lambda: read_plainly(plain, whole, 2),
            "load_into": lambda: checkpoint.load_into(targets),
            "tensors()": stream,
        }
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(arguments.rounds):
            for name, run in work.items():
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{len(workload.tensors)} tensors, {workload.nbytes / 1e9:.2f} GB; plain reads {medians['plain']:.3f} s\n")
    print("| | seconds | microseconds a tensor beyond the bytes |\n|---|---:|---:|")
    for name in ("load_into", "tensors()"):
        # A stream of mapped pages reads nothing by itself, so all of its time is overhead.
        moved = medians["plain"] if name == "load_into" else 0.0
        each = (medians[name] - moved) / len(workload.tensors) * 1e6
        print(f"| {name} | {medians[name]:.3f} | {each:.1f} |")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
