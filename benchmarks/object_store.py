"""Loads checkpoints from S3 on loopback: through this package, s3torchconnector, and plain range requests.

    python -m benchmarks.object_store

The server is nginx, or a small one of the benchmark's own, over files in the page cache; it takes a share of the same
CPUs. The limit is what sockets give: ranges received straight into the tensors, and nothing else. Rounds are
interleaved, memory was touched before; every way is checked once, bit for bit, into poisoned memory.
"""

import os
import platform
import socket
import sys
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import obstore
import s3torchconnector.dcp
import torch
import torch.distributed.checkpoint as torch_dcp
from obstore.store import ClientConfig, S3Store
from safetensors.torch import save_file

from engine_loader import dcp, open_checkpoint
from engine_loader.bench.page_cache import warm
from engine_loader.bench.workload import Workload
from engine_loader.formats.safetensors import TensorInfo
from engine_loader.machine import cpu_model, usable_cpus

from .arguments import parser_of
from .checkpoints import GIB
from .dcp import Tensors, make_tensors, measure, plain_workload
from .static_server import serving

REGION = "us-east-1"
RANGE_BYTES = 8 << 20
PLAIN_THREADS = (2, 4, 8, 16)
LIMIT_BYTES = 16 << 20
LIMIT_THREADS = (2, 4)


def range_requests(workload: Workload, endpoint: str, bucket: str, threads: int) -> Callable[[Tensors], object]:
    """obstore's ``get_range`` on threads, 8 MiB each, copied into the tensors."""
    client: ClientConfig = {"allow_http": True, "timeout": timedelta(minutes=5)}
    ranges = [(info, begin) for info in workload.tensors for begin in range(0, info.nbytes, RANGE_BYTES)]

    def load(targets: Tensors) -> None:
        # As in every other way, connections are new ones.
        store = S3Store(bucket, endpoint=endpoint, skip_signature=True, client_options=client)
        memory = {name: target.view(-1).view(torch.uint8).numpy() for name, target in targets.items()}

        def fetch(piece: tuple[TensorInfo, int]) -> None:
            info, begin = piece
            end = min(begin + RANGE_BYTES, info.nbytes)
            content = obstore.get_range(store, Path(info.file).name, start=info.offset + begin, end=info.offset + end)
            np.copyto(memory[info.name][begin:end], np.frombuffer(content, np.uint8))  # type: ignore[call-overload]

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fetch, ranges))

    return load


def sockets(workload: Workload, endpoint: str, root: Path, threads: int) -> Callable[[Tensors], object]:
    """Ranges of the files below ``root`` by plain sockets, each received where it goes."""
    place = urlsplit(endpoint)

    def load(targets: Tensors) -> None:
        memory = {name: target.view(-1).view(torch.uint8).numpy().data for name, target in targets.items()}
        ranges = deque(
            (Path(info.file).relative_to(root), info.offset + begin, memory[info.name][begin : begin + LIMIT_BYTES])
            for info in workload.tensors
            for begin in range(0, info.nbytes, LIMIT_BYTES)
        )

        def receive() -> None:
            with socket.create_connection((place.hostname, place.port)) as connection, suppress(IndexError):
                while True:
                    name, begin, target = ranges.popleft()
                    wanted = f"Range: bytes={begin}-{begin + len(target) - 1}\r\n\r\n"
                    connection.sendall(f"GET /{name} HTTP/1.1\r\nHost: {place.netloc}\r\n{wanted}".encode())
                    _pass_headers(connection)
                    while target:
                        target = target[connection.recv_into(target) :]

        with ThreadPoolExecutor(threads) as pool:
            for future in [pool.submit(receive) for _ in range(threads)]:
                future.result()

    return load


def _pass_headers(connection: socket.socket) -> None:
    while (end := (seen := connection.recv(4096, socket.MSG_PEEK)).find(b"\r\n\r\n")) < 0:
        if not seen:
            raise SystemExit("the server closed the connection")
    if not seen.startswith(b"HTTP/1.1 206 "):
        raise SystemExit(f"the server answered {seen.splitlines()[0]!r}")
    connection.recv(end + 4, socket.MSG_WAITALL)


def limits(workload: Workload, endpoint: str, root: Path) -> dict[str, Callable[[Tensors], object]]:
    """The ways of ``sockets``, by their names."""
    return {f"the limit: sockets, {n} threads": sockets(workload, endpoint, root, n) for n in LIMIT_THREADS}


def load_into(url: str, targets: Tensors) -> None:
    with open_checkpoint(url) as checkpoint:
        checkpoint.load_into(targets)


def stream(url: str, targets: Tensors) -> None:
    with open_checkpoint(url) as checkpoint:
        for name, tensor in checkpoint.tensors():
            targets[name].copy_(tensor)


def ours(url: str, targets: Tensors) -> None:
    torch_dcp.load(targets, storage_reader=dcp.S3StorageReader(REGION, url), no_dist=True)


def theirs(url: str, targets: Tensors) -> None:
    config = s3torchconnector.S3ClientConfig(unsigned=True, force_path_style=True)
    reader = s3torchconnector.dcp.S3StorageReader(REGION, url, s3client_config=config)
    torch_dcp.load(targets, storage_reader=reader, no_dist=True)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--gib", type=float, default=2.27, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="default: %(default)s")
    arguments = parser.parse_args()
    # torch's own threads wait busily for their next copy, on the CPUs that the server needs here.
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="torch.distributed is")
    tensors = make_tensors(int(arguments.gib * GIB))
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    directory = arguments.dir.resolve()
    training, weights = directory / f"dcp-torch_save-{nbytes}", directory / f"model-{nbytes}.safetensors"
    if not (training / ".metadata").exists():
        torch_dcp.save(tensors, storage_writer=dcp.FileSystemWriter(training), no_dist=True)
    if not weights.exists():
        save_file(tensors, weights)
    workload = Workload.of(weights)
    warm([*map(str, training.iterdir()), str(weights)])
    bucket = f"s3://{directory.name}"
    with serving(directory.parent) as (endpoint, server):
        os.environ |= {"AWS_ENDPOINT_URL": endpoint, "ENGINE_LOADER_LOADER__OBJECT_STORE_ANONYMOUS": "true"}
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "obstore", "s3torchconnector"))
        print(f"{cpu_model()}, {usable_cpus()} CPUs, Linux {platform.release()}; {packages}; served by {server}")
        print(f"{nbytes / GIB:.2f} GiB in {len(tensors)} tensors, load average {os.getloadavg()[0]:.2f}")
        print("\n### dcp.load, a training's checkpoint\n")
        loads: dict[str, Callable[[Tensors], object]] = {
            "engine_loader.dcp.S3StorageReader": partial(ours, f"{bucket}/{training.name}"),
            "s3torchconnector.dcp.S3StorageReader": partial(theirs, f"{bucket}/{training.name}"),
            **limits(plain_workload(training), endpoint, directory.parent),
        }
        against = ["s3torchconnector.dcp.S3StorageReader"]
        measure(loads, tensors, arguments.rounds, against=against, ratio="times s3torchconnector")
        print("### open_checkpoint, a safetensors file\n")
        plain = {
            f"obstore get_range, {n} threads": range_requests(workload, endpoint, directory.name, n)
            for n in PLAIN_THREADS
        }
        url = f"{bucket}/{weights.name}"
        opens: dict[str, Callable[[Tensors], object]] = {
            "engine_loader load_into": partial(load_into, url),
            "engine_loader tensors() + copy_": partial(stream, url),
            **plain,
            **limits(workload, endpoint, directory.parent),
        }
        measure(opens, tensors, arguments.rounds, against=list(plain), ratio="times the fastest obstore")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
