"""Measures how fast a checkpoint's bytes reach parameters on a GPU, and prints Markdown for docs/cuda.md.

    python -m benchmarks.cuda

The limit is the lesser of two: copies out of page-locked memory (cudaMemcpyAsync) into the same parameters, and
threads of preadv that read the same files into page-locked memory. Beside this package run the other loaders that are
installed: pip install fastsafetensors runai-model-streamer instanttensor (with --no-deps where they would bring another
torch). The checkpoint is made once and reused. Every contender's parameters are compared with the files, bit for bit,
before it is measured; rounds are interleaved; figures are medians. Without a GPU it says so and ends. `--device cpu`
rehearses it without one: what runs is then not what is to be measured.
"""

import argparse
import importlib.util
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.checkpoints import GIB, make_checkpoint
from engine_loader import open_checkpoint
from engine_loader.benchmarking import page_cache, report
from engine_loader.benchmarking.workload import Workload
from engine_loader.transfer.cpus import default_threads

PINNED_BYTES = 256 << 20
CHUNK_BYTES = 8 << 20
Parameters = dict[str, torch.Tensor]
Load = Callable[[list[str], Parameters], None]
Pairs = Iterator[tuple[str, torch.Tensor]]


@dataclass
class Contender:
    """One way to fill parameters.

    Attributes:
        fills: whether the parameters hold the files afterwards; the limits do not.
    """

    name: str
    load: Load
    fills: bool = True
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def main() -> None:
    arguments = _arguments()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no GPU here that torch can use: nothing was measured.")
        return
    device = torch.device(arguments.device)
    if device.type == "cpu":
        print("**A rehearsal, on the CPU: these figures say nothing about a GPU.**\n")
    path = _checkpoint(arguments.dir, arguments.gib)
    workload = Workload.of(path)
    print(f"Machine: {_gpu(device)}{report.machine_line(report.describe_machine(workload))}.\n")
    print(f"Checkpoint: {report.workload_line(workload)}. Medians of {arguments.rounds} interleaved rounds.\n")
    parameters = _parameters(workload.files, device)
    contenders = [one for one in _contenders(device) if not one.fills or re.search(arguments.only, one.name)]
    for source in arguments.sources:
        with _Source(source, path) as files:
            _verify(files, parameters, contenders)
            _measure(files, parameters, contenders, arguments.rounds, cold=source == "disk")
            print(_table(source, contenders, workload.nbytes))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    default = Path(tempfile.gettempdir()) / "engine-loader-benchmark"
    parser.add_argument("--dir", type=Path, default=default, help="where the checkpoint is kept (default: %(default)s)")
    parser.add_argument("--gib", type=float, default=6.0, help="its size (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default: %(default)s)")
    parser.add_argument("--only", type=re.compile, default="", metavar="REGEX", help="these contenders, and the limits")
    parser.add_argument("--device", default="cuda:0", help="default: %(default)s")
    sources = ("cache", "tmpfs", "disk")
    parser.add_argument("--sources", nargs="+", choices=sources, default=list(sources), help="default: all")
    return parser.parse_args()


def _checkpoint(directory: Path, gib: float) -> Path:
    path = directory / f"llama-{gib:g}gib-6files"
    if not path.exists():
        unfinished = path.with_suffix(".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        make_checkpoint(unfinished, int(gib * GIB), 6)
        unfinished.rename(path)
    return path


class _Source:
    """The checkpoint's files where they are to be read from; a context manager. "cache" and "disk" are one place."""

    def __init__(self, name: str, path: Path) -> None:
        self._path = path
        self._copied = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="engine-loader-")) if name == "tmpfs" else None

    def __enter__(self) -> list[str]:
        files = sorted(self._path.glob("*.safetensors"))
        if self._copied is not None:
            files = [Path(shutil.copy(file, self._copied)) for file in files]
        return [str(file) for file in files]

    def __exit__(self, *_: object) -> None:
        if self._copied is not None:
            shutil.rmtree(self._copied)


def _parameters(files: tuple[str, ...] | list[str], device: torch.device) -> Parameters:
    with open_checkpoint(list(files)) as checkpoint:
        infos = {name: checkpoint.info(name).as_torch() for name in checkpoint}
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name, (dtype, shape) in infos.items()}


# --- contenders ----------------------------------------------------------------------------------------------------


def _contenders(device: torch.device) -> list[Contender]:
    threads = default_threads()
    found = [
        Contender("page-locked memory to the device", _PinnedCopies(device), fills=False),
        Contender(f"preadv, {threads} threads, to page-locked memory", _PinnedReads(device, threads), fills=False),
        Contender("engine_loader, load_into", _load_into),
        Contender("engine_loader, tensors()", _by_pairs(lambda files: _stream(files, device))),
    ]
    peers: dict[str, Callable[[list[str]], Pairs]] = {
        "fastsafetensors": lambda files: _fastsafetensors(files, device),
        "runai_model_streamer": _runai,
        "instanttensor": lambda files: _instanttensor(files, device),
    }
    installed = {name: pairs for name, pairs in peers.items() if importlib.util.find_spec(name) is not None}
    if device.type == "cpu":
        installed.pop("instanttensor", None)
    return found + [Contender(name, _by_pairs(pairs)) for name, pairs in installed.items()]


def _pinned(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.ones(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


class _PinnedCopies:
    """All of the parameters' bytes out of one page-locked buffer, asynchronously: what the bus gives."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = _pinned(PINNED_BYTES, device)

    def __call__(self, files: list[str], parameters: Parameters) -> None:
        for parameter in parameters.values():
            flat = parameter.view(-1).view(torch.uint8)
            for part in flat.split(PINNED_BYTES):
                part.copy_(self._buffer[: part.numel()], non_blocking=True)


class _PinnedReads:
    """All bytes of the files into page-locked memory, over and over: what the source gives."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self._threads = threads
        self._buffers = _pinned(threads * CHUNK_BYTES, device).numpy()

    def __call__(self, files: list[str], parameters: Parameters) -> None:
        chunks = [(file, at) for file in files for at in range(0, os.path.getsize(file), CHUNK_BYTES)]
        opened = {file: os.open(file, os.O_RDONLY) for file in files}

        def read(thread: int) -> None:
            memory = memoryview(self._buffers)[thread * CHUNK_BYTES : (thread + 1) * CHUNK_BYTES]
            for file, at in chunks[thread :: self._threads]:
                os.preadv(opened[file], [memory], at)

        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(read, range(self._threads)))
        for descriptor in opened.values():
            os.close(descriptor)


def _load_into(files: list[str], parameters: Parameters) -> None:
    with open_checkpoint(files) as checkpoint:
        checkpoint.load_into(parameters)


def _stream(files: list[str], device: torch.device) -> Pairs:
    with open_checkpoint(files, device=device) as checkpoint:
        yield from checkpoint.tensors()


def _by_pairs(pairs: Callable[[list[str]], Pairs]) -> Load:
    def load(files: list[str], parameters: Parameters) -> None:
        for name, tensor in pairs(files):
            parameters[name].copy_(tensor)

    return load


def _fastsafetensors(files: list[str], device: torch.device) -> Pairs:
    from fastsafetensors import SingleGroup
    from fastsafetensors.parallel_loader import ParallelLoader

    loader = ParallelLoader(SingleGroup(), files, nogds=True, use_tqdm_on_load=False, device=str(device))
    try:
        with closing(loader.iterate_weights()) as weights:
            yield from weights
    finally:
        loader.close()


def _runai(files: list[str]) -> Pairs:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(files, device="cpu")
        yield from streamer.get_tensors()


def _instanttensor(files: list[str], device: torch.device) -> Pairs:
    import instanttensor

    number = device.index or 0
    with instanttensor.safe_open(files, framework="pt", device=number, process_group=None, copy=True) as opened:
        yield from opened.tensors()


# --- measuring -------------------------------------------------------------------------------------------------------


def _verify(files: list[str], parameters: Parameters, contenders: list[Contender]) -> None:
    """Every contender's parameters against the files; those that fail or differ are left out, and named."""
    with open_checkpoint(files) as checkpoint:
        expected = {name: tensor.clone() for name, tensor in checkpoint.tensors()}
    for contender in list(contenders):
        contender.seconds, contender.cpu_seconds, contender.peak_bytes = [], [], 0
        for parameter in parameters.values():
            parameter.zero_()
        try:
            contender.load(files, parameters)
        except Exception as error:
            print(f"{contender.name} failed and is left out: {error!r}\n")
            contenders.remove(contender)
            continue
        wrong = [name for name in expected if contender.fills and not _equal(parameters[name], expected[name])]
        if wrong:
            print(f"{contender.name} got {len(wrong)} tensors wrong ({wrong[0]}, …) and is left out.\n")
            contenders.remove(contender)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.cpu().view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def _measure(files: list[str], parameters: Parameters, contenders: list[Contender], rounds: int, *, cold: bool) -> None:
    on_gpu = next(iter(parameters.values())).is_cuda
    for _ in range(rounds):
        for contender in contenders:
            (page_cache.drop if cold else page_cache.warm)(files)
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if on_gpu else 0
            cpu, begin = time.process_time(), time.perf_counter()
            contender.load(files, parameters)
            if on_gpu:
                torch.cuda.synchronize()
            contender.seconds.append(time.perf_counter() - begin)
            contender.cpu_seconds.append(time.process_time() - cpu)
            if on_gpu:
                contender.peak_bytes = max(contender.peak_bytes, torch.cuda.max_memory_allocated() - before)


def _table(source: str, contenders: list[Contender], nbytes: int) -> str:
    speeds = {contender.name: nbytes / statistics.median(contender.seconds) / 1e9 for contender in contenders}
    limits = [speeds[contender.name] for contender in contenders if not contender.fills]
    limit = min(limits) if limits else max(speeds.values())
    rows = [f"From {source}:\n", "| into parameters | s | GB/s | of the limit | CPU s | device memory beyond, MiB |"]
    rows.append("|---|---|---|---|---|---|")
    for contender in contenders:
        seconds, cpu = statistics.median(contender.seconds), statistics.median(contender.cpu_seconds)
        speed, peak = speeds[contender.name], contender.peak_bytes / (1 << 20)
        rows.append(
            f"| {contender.name} | {seconds:.2f} | {speed:.2f} | {speed / limit:.2f} | {cpu:.2f} | {peak:.0f} |"
        )
    return "\n".join(rows) + "\n"


def _gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    about = torch.cuda.get_device_properties(device)
    return f"{about.name}, {about.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda or torch.version.hip}; "


if __name__ == "__main__":
    main()
