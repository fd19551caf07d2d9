"""Beyond the parameters that it fills, streaming takes no more memory than the buffers and the largest tensor."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20
LARGEST = 256 * MIB
SLACK = 48 * MIB
"""Stacks, scratch memory and the allocator's own."""

SIZES = [LARGEST, *[14 * MIB + 4096] * 60, 3 * MIB, LARGEST, *[20 * MIB] * 30, *[100_000] * 500, 64 * MIB, 5]

CHILD = """
import json, sys, torch
from engine_loader import open_checkpoint

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

path, options = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(1)
with open_checkpoint(path, **options) as opened:
    parameters = {name: torch.zeros(opened.info(name).shape, dtype=torch.uint8).fill_(1) for name in opened.keys()}
    opened.get_tensor(list(opened)[-1])  # starts the reader threads
    open("/proc/self/clear_refs", "w").write("5")
    before = kib("VmRSS")
    for name, tensor in opened.tensors():
        parameters[name].copy_(tensor)
    peak = kib("VmHWM") - before
right = all(int(p[0]) == int(p[-1]) == int(name[1:]) % 251 for name, p in parameters.items())
print(json.dumps({"peak": peak * 1024, "right": right}))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """2 GiB: every tensor is filled with a byte of its own."""
    path = tmp_path_factory.mktemp("large") / "model.safetensors"
    header, offset = {}, 0
    for number, size in enumerate(SIZES):
        header[f"t{number}"] = {"dtype": "U8", "shape": [size], "data_offsets": [offset, offset + size]}
        offset += size
    assert 2 << 30 <= offset < 3 << 30
    text = json.dumps(header).encode()
    with open(path, "wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, size in enumerate(SIZES):
            content = memoryview(bytes([number % 251]) * min(size, 4 * MIB))
            for begin in range(0, size, 4 * MIB):
                file.write(content[: size - begin])
    yield path
    path.unlink()


def peak(path: Path, **options: object) -> int:
    """Bytes of resident memory at the worst moment, without the parameters. Mapped pages of files count too."""
    arguments = [sys.executable, "-c", CHILD, str(path), json.dumps(options)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["right"]
    return answer["peak"]


@pytest.mark.slow
def test_peak_memory_with_the_defaults(path):
    assert peak(path) < LARGEST + 512 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("way", ["python", "direct"], indirect=True)
def test_peak_memory_with_small_buffers(path, way):
    assert peak(path, **way, buffer_bytes="64MiB") < LARGEST + 64 * MIB + SLACK
