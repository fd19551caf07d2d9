"""One rank of a node in a process of its own: it fills the parameters of its layout and says what it read.

    python -m tests.loading.sharing.rank OPTIONS     (JSON, see ``Options``)

It waits for a line on its input before it loads, and writes one line of JSON at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine_loader.errors import CheckpointError
from engine_loader.formats.safetensors import TensorInfo
from engine_loader.loading.direct.copies import copy_extents
from engine_loader.loading.find import SafetensorsFiles
from engine_loader.loading.safetensors_store import SafetensorsStore
from engine_loader.loading.shards import open_files
from engine_loader.loading.sharing import NodeRanks
from engine_loader.report.load_report import LoadReport
from engine_loader.settings import LoaderSettings
from engine_loader.sources.registry import make_source


@dataclass
class Options:
    """What a rank loads.

    Attributes:
        files: of the checkpoint.
        rank: its number, below ``ranks``.
        ranks: among which "rows" and "inner" tensors are divided.
        node: how many ranks it takes the node to have.
        settings: of the loader.
        pause_s: between two batches.
        batch: tensors whose copies are submitted together.
        meet: wait, behind the first batch, until so many ranks have joined.
        fall: a signal that it sends itself while it reads blocks for all, and another rank is there; 0: none.
        fall_after_s: since it was first seen to read; it still does then.
    """

    files: list[str]
    rank: int
    ranks: int
    node: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    pause_s: float = 0.0
    batch: int = 3
    meet: int = 0
    fall: int = 0
    fall_after_s: float = 0.0


def part_of(name: str, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """What a rank keeps of a tensor, by its name: a range of rows, of columns, its own, or all of it."""
    kind = name.rpartition(".")[2]
    if kind == "rows":
        return tensor.chunk(ranks, 0)[rank]
    if kind == "inner":
        return tensor.chunk(ranks, 1)[rank]
    if kind == "own":
        return tensor if int(name.split(".")[1]) % ranks == rank else tensor[:0]
    return tensor


def parts(infos: list[TensorInfo], options: Options) -> Iterator[tuple[TensorInfo, torch.Tensor, torch.Tensor]]:
    """(tensor, view of its geometry, target) of all that a rank keeps."""
    for info in infos:
        dtype, shape = info.as_torch()
        view = part_of(info.name, torch.empty(shape, dtype=dtype, device="meta"), options.rank, options.ranks)
        yield info, view, torch.full(tuple(view.shape), 77, dtype=dtype)


def fall_while_reading(store: SafetensorsStore, options: Options) -> None:
    reads = 0
    while not store._closed:
        member = store._sharing and store._sharing._member
        if member is not None and (found := member.statistics()).reading and found.members > 1:
            reads += 1
            if reads == 1:
                time.sleep(options.fall_after_s)
            else:
                os.kill(os.getpid(), options.fall)
                return
        time.sleep(0.0005)


def load(options: Options) -> dict[str, Any]:
    settings = LoaderSettings(**options.settings)
    source = make_source(settings.backend, settings=settings)
    files = open_files(source, SafetensorsFiles(tuple(options.files)))
    ranks = NodeRanks(options.node or options.ranks, lambda name: name.endswith(".own"))
    found: dict[str, Any] = {}
    before = bytes_from_disk()
    with SafetensorsStore(files, source.name, settings, ranks=ranks) as store:
        wanted = list(parts(list(store.infos), options))
        if options.fall:
            threading.Thread(target=fall_while_reading, args=(store, options), daemon=True).start()
        begin = time.monotonic()
        transfers = []
        for first in range(0, len(wanted), options.batch):
            extents, owners = [], []
            for info, view, target in wanted[first : first + options.batch]:
                extents += copy_extents(store.file_number(info), info.offset, view, target) or []
                owners.append(target)
            transfers.append(store.submit(extents, owners))
            time.sleep(options.pause_s)
            member = store._sharing and store._sharing._member
            while member is not None and member.statistics().most_members < options.meet:
                time.sleep(0.01)
        try:
            for transfer in transfers:
                transfer.wait()
        except CheckpointError as error:
            for transfer in transfers:
                transfer.cancel()
            found["error"] = str(error)
        found["seconds"] = time.monotonic() - begin
        member = store._sharing and store._sharing._member
        if member is not None:
            found |= {name: int(getattr(member.statistics(), name)) for name, _ in type(member.statistics())._fields_}
        if "error" in found:
            return found
        statistics = store._running_readers().statistics()
        found["from_disk"] = bytes_from_disk() - before
        found["read"] = statistics.bytes_read + statistics.overread_bytes
        report = LoadReport()
        if store._sharing is not None:
            found["read"] += store._sharing.bytes_read
            store._sharing.complete_report(report)
        found["notes"] = report.notes
        found["why_not"] = store._sharing._why_not if store._sharing is not None else ""
    found["sums"] = {info.name: checksum(target) for info, _, target in wanted}
    return found


def bytes_from_disk() -> int:
    """That this process had the kernel fetch."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def checksum(tensor: torch.Tensor) -> str:
    """The same for the same bytes in the same order."""
    return hashlib.sha1(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def main() -> None:
    options = Options(**json.loads(sys.argv[1]))
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(load(options)), flush=True)


if __name__ == "__main__":
    main()
