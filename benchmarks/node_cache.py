"""Measures starts from S3 with the node's cache of weights: the first over a slow link, later ones from the disk.

    python -m benchmarks.node_cache                          # 1 GiB, link 200 MB/s, disk 1 GB/s
    python -m benchmarks.node_cache --gib 4 --rounds 9

The disk is one of that bandwidth by throttle.c, over files in the page cache. Its limit is what plain reads of the kept
files reach on as many threads, in turns with the starts. Each start is a process of its own, timed from opening the
checkpoint to the last byte in parameters that were touched before; the first of all compares every byte.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine_loader import open_checkpoint
from engine_loader.bench.workload import Parameters
from engine_loader.report.load_report import LoadReport
from engine_loader.sources.kept import node_cache

from .static_server import serving

MB, MIB, GIB = 1_000_000, 1 << 20, 1 << 30
THREADS = 16
READ_BYTES = 8 << 20
FLUSH_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gib", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--link", type=int, default=200, help="MB/s (default: %(default)s)")
    parser.add_argument("--disk", type=int, default=1000, help="MB/s (default: %(default)s)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(json.loads(arguments.child))
        return
    with tempfile.TemporaryDirectory(prefix="engine-loader-node-cache-") as place:
        measure(Path(place), arguments.gib, arguments.rounds, arguments.link * MB, arguments.disk * MB)


def measure(place: Path, gib: float, rounds: int, link: int, disk: int) -> None:
    bucket = place / "bucket"
    bucket.mkdir()
    paths = make_model(bucket, int(gib * GIB))
    nbytes = sum(path.stat().st_size for path in paths)
    shim, shared = place / "throttle.so", place / "disk"
    code = Path(__file__).with_name("throttle.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", str(code), "-o", str(shim), "-ldl"], check=True)
    shared.write_bytes(bytes(16))
    throttled = {"LD_PRELOAD": str(shim), "THROTTLE_FILE": str(shared), "THROTTLE_BYTES_PER_S": str(disk)}
    with serving(place, link) as (url, _):
        options = {
            "urls": [f"s3://bucket/{path.name}" for path in paths],
            "settings": {
                "object_store_endpoint_url": url,
                "object_store_anonymous": True,
                "cache_directory": str(place / "cache"),
            },
        }
        first = start({**options, "compare": [str(path) for path in paths]}, {})
        print(f"{nbytes / GIB:.2f} GiB in {len(paths)} objects; first start: {first['seconds']:.2f} s, {first['line']}")
        plain, later = [], []
        for _ in range(rounds):
            plain.append(start({"plain": str(place / "cache")}, throttled)["seconds"])
            found = start(options, throttled)
            later.append(found["seconds"])
    print(f"a later start: {found['line']}")
    limit, median = statistics.median(plain), statistics.median(later)
    if limit < 0.9 * nbytes / disk:
        raise RuntimeError(f"the disk was not throttled: {nbytes / limit / MB:.0f} MB/s")
    print(f"plain reads of the kept files: {limit:.2f} s ({min(plain):.2f} - {max(plain):.2f})")
    print(f"later starts: {median:.2f} s ({min(later):.2f} - {max(later):.2f}), {limit / median:.0%} of the limit")


def make_model(directory: Path, nbytes: int) -> list[Path]:
    """Files of 256 MiB with tensors of 16 MiB."""
    paths = []
    torch.manual_seed(0)
    for number in range(max(1, nbytes // (256 * MIB))):
        path = directory / f"model-{number:05}.safetensors"
        save_file({f"{number}.{part}": torch.randn(4096, 1024) for part in range(16)}, path)
        paths.append(path)
    return paths


def start(options: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.node_cache", "--child", json.dumps(options)]
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_child(options: dict[str, Any]) -> None:
    found = read_plainly(Path(options["plain"])) if "plain" in options else load(options)
    print(json.dumps(found))


def load(options: dict[str, Any]) -> dict[str, Any]:
    settings, urls = dict(options["settings"]), list(options["urls"])
    with open_checkpoint(urls, backend="object_store", **settings) as opened:
        parameters = Parameters([opened.info(name) for name in opened])
    parameters.poison()
    report = LoadReport()
    began = time.perf_counter()
    with open_checkpoint(urls, backend="object_store", **settings) as opened:
        opened.load_into(parameters.tensors, report=report)
    seconds = time.perf_counter() - began
    cache = node_cache._cache_at(settings["cache_directory"], None)
    assert cache is not None and cache.flush(FLUSH_S)
    for path in options.get("compare", ()):
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor.view(torch.uint8), parameters.tensors[name].view(torch.uint8)), name
    return {"seconds": seconds, "line": report.line()}


def read_plainly(directory: Path) -> dict[str, Any]:
    """Read all kept files into memory that was touched, on threads."""
    paths = deque(sorted(directory.glob("*/*/*/*-*")))

    def work() -> None:
        buffer = bytearray(READ_BYTES)
        while paths:
            try:
                path = paths.popleft()
            except IndexError:
                return
            fd = os.open(path, os.O_RDONLY)
            offset = 0
            while got := os.preadv(fd, [buffer], offset):
                offset += got
            os.close(fd)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main()
