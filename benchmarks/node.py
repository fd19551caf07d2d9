"""Measures what the ranks of one machine read together, and prints Markdown for docs/performance-direct.md.

    python -m benchmarks.node
    python -m benchmarks.node --only usrbio --ranks 8
    python -m benchmarks.node --link 0.5 --gib 0.5     (where all processes have two CPUs together)

Processes load one Llama as ranks of a layout, at the same time, over one link: from 3FS (the emulator), from a file
system (O_DIRECT, every read held back to the link's pace), and from S3 on loopback. Each has the recorded plan of its
rank: what vLLM's code copies of each tensor. Beside it: the same with `share: off`, and one process that reads the
whole checkpoint alone. A first round is checked, byte for byte; figures are medians of the others, and times are
divided by what the one process took in the same round. Ranks are forked from a process that has imported everything.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.arguments import parser_of
from benchmarks.checkpoints import GIB, make_checkpoint
from benchmarks.static_server import serving
from engine_loader.bench import page_cache
from engine_loader.loading.direct.copies import bytes_of, copy_extents
from engine_loader.loading.find import SafetensorsFiles
from engine_loader.loading.safetensors_store import SafetensorsStore
from engine_loader.loading.shards import open_files
from engine_loader.loading.sharing import NodeRanks
from engine_loader.settings import LoaderSettings
from engine_loader.sources.registry import make_source
from engine_loader.threefs_emulator import build_emulator
from engine_loader.transfer.protocol import Transfer

GB = 1e9
BATCH_BYTES = 32 << 20
ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
INNER = ("o_proj", "down_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
SOURCES = {"usrbio": "3FS", "posix": "file system, O_DIRECT", "s3": "S3"}


@dataclass(frozen=True)
class Layout:
    """How the ranks of a machine divide a model.

    Attributes:
        tensor: ranks among which each tensor is divided.
        replicas: of that, each with all of the model.
        experts: the MLPs are experts, one rank's each, and all else is every rank's.
    """

    tensor: int
    replicas: int = 1
    experts: bool = False

    @property
    def ranks(self) -> int:
        return self.tensor * self.replicas

    @property
    def name(self) -> str:
        if self.experts:
            return f"expert parallel {self.ranks}, attention replicated"
        parts = [f"tensor parallel {self.tensor}"] if self.tensor > 1 else []
        return ", ".join([*parts, *([f"{self.replicas} replicas"] if self.replicas > 1 else [])]) or "one rank"

    def part(self, name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        """What a rank keeps of a tensor."""
        module = name.split(".")[-2]
        if self.experts:
            own = module not in MLP or int(name.split(".")[2]) % self.ranks == rank
            return tensor if own else tensor[:0]
        of, number = self.tensor, rank % self.tensor
        if module in ("k_proj", "v_proj"):
            of = min(of, tensor.shape[0] // 64)
            number = number * of // self.tensor
        if module in ROWS:
            return tensor.chunk(of, 0)[number]
        return tensor.chunk(of, 1)[number] if module in INNER else tensor


def is_expert(name: str) -> bool:
    return name.split(".")[-2] in MLP


def load(
    files: Sequence[str], layout: Layout, rank: int, settings: LoaderSettings, check: bool, start: Callable[[], None]
) -> dict[str, Any]:
    """Load as one rank; ``start`` returns when all are to begin."""
    source = make_source(settings.backend, settings=settings)
    opened = open_files(source, SafetensorsFiles(tuple(files)))
    ranks = NodeRanks(layout.ranks, is_expert) if layout.experts else NodeRanks(layout.ranks)
    with SafetensorsStore(opened, source.name, settings, ranks=ranks) as store:
        wanted = []
        for info in store.infos:
            dtype, shape = info.as_torch()
            view = layout.part(info.name, torch.empty(shape, dtype=dtype, device="meta"), rank)
            wanted.append((info, view, torch.zeros(view.shape, dtype=dtype)))
        start()
        begin = time.monotonic()
        transfers: list[Transfer] = []
        extents, owners = [], []
        for info, view, target in wanted:
            extents += copy_extents(store.file_number(info), info.offset, view, target) or []
            owners.append(target)
            if bytes_of(extents) >= BATCH_BYTES:
                transfers.append(store.submit(extents, owners))
                extents, owners = [], []
        transfers.append(store.submit(extents, owners))
        for transfer in transfers:
            transfer.wait()
        end = time.monotonic()
        statistics = store._running_readers().statistics()
        read = statistics.bytes_read + statistics.overread_bytes
        read += store._sharing.bytes_read if store._sharing is not None else 0
    sums = {info.name: digest(target) for info, _, target in wanted} if check else {}
    return {
        "begin": begin,
        "end": end,
        "read": read,
        "sums": sums,
    }


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha1(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


@dataclass
class Place:
    """A source: the files there, the settings and the environment of who reads them."""

    files: list[str]
    settings: dict[str, Any]
    environment: dict[str, str]


@contextmanager
def place(source: str, checkpoint: Path, scratch: Path, link: int) -> Iterator[Place]:
    """A checkpoint behind a link of so many bytes a second."""
    files = sorted(str(file) for file in checkpoint.glob("*.safetensors"))
    if source == "usrbio":
        library = build_emulator(scratch / "lib")
        environment = {
            "HF3FS_LIB_DIR": str(library.parent),
            "HF3FS_EMULATOR_MOUNT": str(checkpoint.resolve()),
            "HF3FS_EMULATOR_OPTIONS": f"bandwidth={link},shared_link=1,dma=1",
        }
        try:
            yield Place(files, {"backend": "usrbio"}, environment)
        finally:
            shutil.rmtree(checkpoint / "3fs-virt", ignore_errors=True)
    elif source == "posix":
        shim, shared = scratch / "throttle.so", scratch / "link"
        code = Path(__file__).with_name("throttle.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", str(code), "-o", str(shim), "-ldl"], check=True)
        shared.write_bytes(bytes(16))
        environment = {
            "LD_PRELOAD": str(shim),
            "THROTTLE_FILE": str(shared),
            "THROTTLE_BYTES_PER_S": str(link),
        }
        yield Place(files, {"backend": "posix", "read_mode": "direct"}, environment)
    else:
        with serving(checkpoint.parent, link) as (url, _):
            settings = {"object_store_endpoint_url": url, "object_store_anonymous": True, "backend": "object_store"}
            yield Place([f"s3://{checkpoint.name}/{Path(file).name}" for file in files], settings, {})


class Machine:
    """A process that has imported everything, and forks the ranks of each round."""

    def __init__(self, where: Place) -> None:
        self._files, self._settings = where.files, where.settings
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.node", "--machine"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | where.environment,
        )

    def run(self, layout: Layout, share: str, *, check: bool = False) -> list[dict[str, Any]]:
        """Load once with all ranks of a layout; returns what each says."""
        settings = self._settings | {"share": share, "ranks_per_node": layout.ranks}
        options = {"files": self._files, "layout": asdict(layout), "settings": settings, "check": check}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(options)}\n")
        self._process.stdin.flush()
        return list(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


def fork_ranks(options: dict[str, Any]) -> list[dict[str, Any]]:
    """The ranks of a round: each says that it is ready, and begins when all are."""
    layout = Layout(**options["layout"])
    settings = LoaderSettings(**options["settings"])
    go_read, go_write = os.pipe()
    pipes = []
    for rank in range(layout.ranks):
        read, write = os.pipe()
        if os.fork() == 0:
            os.close(go_write)

            def start(write: int = write) -> None:
                os.write(write, b"\n")
                os.read(go_read, 1)  # returns when the other end is closed

            found = load(options["files"], layout, rank, settings, options["check"], start)
            with os.fdopen(write, "w") as answer:
                answer.write(json.dumps(found))
            os._exit(0)
        os.close(write)
        pipes.append(os.fdopen(read))
    for pipe in pipes:
        assert pipe.readline() == "\n"
    os.close(go_write)
    answers = [json.loads(pipe.read()) for pipe in pipes]
    os.close(go_read)
    for pipe in pipes:
        pipe.close()
        os.wait()
    return answers


def seconds(found: Sequence[dict[str, Any]]) -> float:
    return float(max(each["end"] for each in found) - min(each["begin"] for each in found))


def verify(found: Sequence[dict[str, Any]], layout: Layout, checkpoint: Path) -> None:
    from safetensors import safe_open

    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                tensor = opened.get_tensor(name)
                for rank, each in enumerate(found):
                    assert each["sums"][name] == digest(layout.part(name, tensor, rank)), (name, rank)


def measure(source: str, checkpoint: Path, layouts: Sequence[Layout], scratch: Path, arguments: Any) -> None:
    files = [str(file) for file in checkpoint.glob("*.safetensors")]
    nbytes = sum(Path(file).stat().st_size for file in files)
    variants = [(Layout(1), "off"), (Layout(1), "auto")]
    variants += [(layout, share) for layout in layouts for share in ("off", "auto")]
    took: dict[tuple[Layout, str], list[float]] = {variant: [] for variant in variants}
    read = dict.fromkeys(variants, 0.0)
    with place(source, checkpoint, scratch, int(arguments.link * GB)) as where:
        machine = Machine(where)
        page_cache.warm(files) if source != "posix" else page_cache.drop(files)
        for layout in layouts if arguments.check else ():
            verify(machine.run(layout, "auto", check=True), layout, checkpoint)
        for _ in range(arguments.rounds):
            for layout, share in variants:
                found = machine.run(layout, share)
                took[layout, share].append(seconds(found))
                print(f"{source}, {layout.name}, {share}: {seconds(found):.2f} s", file=sys.stderr)
                read[layout, share] = max(read[layout, share], sum(each["read"] for each in found) / nbytes)
        machine.close()
    alone = took[variants[0]]
    print(f"\n{SOURCES[source]}, {nbytes / GIB:.2f} GiB over {arguments.link:g} GB/s, {arguments.rounds} rounds:\n")
    print("| ranks | `share` | read by all together, of the checkpoint | s to the last rank | of one rank alone |")
    print("|---|---|---:|---:|---:|")
    for (layout, share), times in took.items():
        ratio = median(one / other for one, other in zip(times, alone, strict=True))
        print(f"| {layout.name} | {share} | {read[layout, share]:.2f} | {median(times):.2f} | {ratio:.2f} |")
    sys.stdout.flush()


def serve_rounds() -> None:
    """What the process of a ``Machine`` does."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(fork_ranks(json.loads(line))), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--machine"]:
        serve_rounds()
        return
    parser = parser_of(__doc__, "engine-loader-benchmark-node")
    parser.add_argument("--gib", type=float, default=1.5)
    parser.add_argument("--link", type=float, default=2.0, help="GB/s (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--only", choices=list(SOURCES), nargs="*", default=list(SOURCES))
    parser.add_argument("--layouts", choices=["tensor", "others"], nargs="*", default=["tensor", "others"])
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    checkpoint = arguments.dir / f"node-{arguments.gib:g}"
    if not (checkpoint / "config.json").exists():
        make_checkpoint(checkpoint, int(arguments.gib * GIB), 3)
    layouts = [Layout(ranks) for ranks in arguments.ranks] if "tensor" in arguments.layouts else []
    if "others" in arguments.layouts:
        layouts += [Layout(1, 4), Layout(2, 2), Layout(1, 4, experts=True)]
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} before.")
    with tempfile.TemporaryDirectory() as scratch:
        for source in arguments.only:
            measure(source, checkpoint, layouts, Path(scratch), arguments)
    print(f"\nLoad {os.getloadavg()[0]:.1f} after.")


if __name__ == "__main__":
    main()
