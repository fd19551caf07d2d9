"""Measures what the ranks of one machine read together, and prints Markdown for docs/performance-direct.md.

    python -m benchmarks.node
    python -m benchmarks.node --only usrbio --ranks 8

Processes load one Llama as ranks of a layout, at the same time, over one link of 2 GB/s: from 3FS (the emulator), from
a file system (O_DIRECT, every read held back to the link's pace), and from S3 on loopback. Each has the recorded plan
of its rank: what vLLM's code copies of each tensor. Beside it: the same with `share: off`, and one process that reads
the whole checkpoint alone. The first round is checked, byte for byte; figures are medians of the others.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

LINK = 2_000_000_000
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


def load(files: Sequence[str], layout: Layout, rank: int, settings: LoaderSettings, check: bool) -> dict[str, Any]:
    """Load as one rank, when a line comes on the input."""
    source = make_source(settings.backend, settings=settings)
    opened = open_files(source, SafetensorsFiles(tuple(files)))
    ranks = NodeRanks(layout.ranks, is_expert) if layout.experts else NodeRanks(layout.ranks)
    with SafetensorsStore(opened, source.name, settings, ranks=ranks) as store:
        wanted = []
        for info in store.infos:
            dtype, shape = info.as_torch()
            view = layout.part(info.name, torch.empty(shape, dtype=dtype, device="meta"), rank)
            wanted.append((info, view, torch.zeros(view.shape, dtype=dtype)))
        print("ready", flush=True)
        sys.stdin.readline()
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
        read = statistics.bytes_read + statistics.overread_bytes + store._sharing.bytes_read
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
def place(source: str, checkpoint: Path, scratch: Path) -> Iterator[Place]:
    files = sorted(str(file) for file in checkpoint.glob("*.safetensors"))
    if source == "usrbio":
        library = build_emulator(scratch / "lib")
        environment = {
            "HF3FS_LIB_DIR": str(library.parent),
            "HF3FS_EMULATOR_MOUNT": str(checkpoint.resolve()),
            "HF3FS_EMULATOR_OPTIONS": f"bandwidth={LINK},shared_link=1,dma=1",
        }
        yield Place(files, {"backend": "usrbio"}, environment)
    elif source == "posix":
        shim, shared = scratch / "throttle.so", scratch / "link"
        code = Path(__file__).with_name("throttle.c")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", str(code), "-o", str(shim), "-ldl"], check=True)
        shared.write_bytes(bytes(16))
        environment = {
            "LD_PRELOAD": str(shim),
            "THROTTLE_FILE": str(shared),
            "THROTTLE_BYTES_PER_S": str(LINK),
        }
        yield Place(files, {"backend": "posix", "read_mode": "direct"}, environment)
    else:
        with serving(checkpoint.parent, LINK) as (url, _):
            settings = {"object_store_endpoint_url": url, "object_store_anonymous": True, "backend": "object_store"}
            yield Place([f"s3://{checkpoint.name}/{Path(file).name}" for file in files], settings, {})


def run_round(where: Place, layout: Layout, share: str, *, check: bool = False) -> list[dict[str, Any]]:
    children = []
    for rank in range(layout.ranks):
        options = {
            "files": where.files,
            "layout": [layout.tensor, layout.replicas, layout.experts],
            "rank": rank,
            "settings": where.settings | {"share": share, "ranks_per_node": layout.ranks},
            "check": check,
        }
        children.append(
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.node", "--child", json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | where.environment,
            )
        )
    found = []
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        for child in children:
            assert child.stdout is not None
            found.append(json.loads(child.stdout.readline()))
    finally:
        for child in children:
            child.kill()
            child.wait()
    return found


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


def measure(source: str, checkpoint: Path, layouts: Sequence[Layout], rounds: int, scratch: Path, check: bool) -> None:
    files = [str(file) for file in checkpoint.glob("*.safetensors")]
    nbytes = sum(Path(file).stat().st_size for file in files)
    rows = []
    with place(source, checkpoint, scratch) as where:
        page_cache.warm(files) if source != "posix" else page_cache.drop(files)
        times = [seconds(run_round(where, Layout(1), "off")) for _ in range(rounds)]
        alone = median(times)
        rows.append(("one rank", "-", "1.00", f"{alone:.2f}", "1.00"))
        for layout in layouts:
            if check:
                verify(run_round(where, layout, "auto", check=True), layout, checkpoint)
            for share in ("off", "auto"):
                found = [run_round(where, layout, share) for _ in range(rounds)]
                read = median(sum(each["read"] for each in one) / nbytes for one in found)
                took = median(map(seconds, found))
                rows.append((layout.name, share, f"{read:.3f}", f"{took:.2f}", f"{took / alone:.2f}"))
    print(f"\n{SOURCES[source]}, a link of 2 GB/s, {nbytes / GIB:.2f} GiB:\n")
    print("| ranks | share | read by the machine, of the checkpoint | s to the last rank | of one rank alone |")
    print("|---|---|---:|---:|---:|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


def child(options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    layout = Layout(*options["layout"])
    settings = LoaderSettings(**options["settings"])
    print(json.dumps(load(options["files"], layout, options["rank"], settings, options["check"])), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
        return
    parser = parser_of(__doc__, "engine-loader-benchmark-node")
    parser.add_argument("--gib", type=float, default=1.5)
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
            measure(source, checkpoint, layouts, arguments.rounds, Path(scratch), arguments.check)
    print(f"\nLoad {os.getloadavg()[0]:.1f} after.")


if __name__ == "__main__":
    main()
