"""Which bytes of a load the ranks of a machine read once for all, and how they are had.

Which bytes other ranks will want is told by the shape of what this one wants: rows with gaps between them are slices
of an inner dimension, and every rank wants some of each block; of a tensor that is kept whole, every rank keeps a copy;
a contiguous part is this rank's alone, or that of as many as its size says.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, TransferError
from ..formats.safetensors import TensorInfo
from ..report.load_report import LoadReport, human_bytes
from ..sources.source import SourceFile
from ..transfer.constructor import make_readers_for
from ..transfer.device_stream import DeviceStream
from ..transfer.native.native_readers import NativeReaders
from ..transfer.plan import Extents, plan_bytes
from ..transfer.protocol import ReaderThreads, Transfer
from ..transfer.window.meeting import meeting_directory, window_bytes
from ..transfer.window.member import Region, WindowMember, is_worth_sharing
from ..transfer.window.shared_transfer import SharedTransfer
from .store import submit_to

if TYPE_CHECKING:
    from ..settings import LoaderSettings

logger = logging.getLogger(__name__)

LEAST_BYTES = 32 << 10
"""A smaller tensor costs less to read again than to share."""
# Rows as long are read as quickly alone as with what lies between them.
_LONG_ROW_BYTES = 256 << 10


def _no_tensor(name: str) -> bool:
    return False


@dataclass(frozen=True)
class NodeRanks:
    """The processes of this machine that load the same layers of the same files at the same time.

    Attributes:
        count: how many, this one counted.
        is_own: true for the name of a tensor that no other rank keeps any of, such as one of this rank's experts.
    """

    count: int
    is_own: Callable[[str], bool] = _no_tensor


class NodeSharing:
    """What a store of tensors shares with those of the machine's other ranks. May be used from several threads.

    Args:
        files: of the store, in the order in which extents number them.
        infos: its tensors.
        settings: how to read.
        ranks: who shares, more than one.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        infos: Iterable[TensorInfo],
        settings: LoaderSettings,
        ranks: NodeRanks,
    ) -> None:
        self._files = files
        self._infos = infos
        self._settings = settings
        self._ranks: NodeRanks | None = ranks  # None when it is closed
        self._tensors: _Tensors | None = None
        self._member: WindowMember | None = None
        self._copies: NativeReaders | None = None
        self._reads: ReaderThreads | None = None
        self._lock = threading.Lock()
        self._why_not = ""
        self._takes: dict[int, bool] = {}

    def submit(
        self, readers: ReaderThreads, plan: Extents, owner: object, stream: DeviceStream | None
    ) -> Transfer | None:
        """Start a plan of which a part can be had by way of the window; None: there is no such part.

        Args:
            readers: read what goes past it, and what this rank reads for all.
            plan: extents of the store's files.
            owner: keeps the destinations alive.
            stream: of the device that holds the destinations; None: they are in the CPU's memory.

        Raises:
            CheckpointError: an extent reaches beyond its file.
        """
        ranks = self._ranks
        if ranks is None or self._why_not or not len(plan):
            return None
        if self._tensors is None:
            self._tensors = _Tensors(self._files, self._infos)
        tensor_of, expected = self._tensors.wanted_by(plan, ranks)
        by_window = (expected > 1) & self._taken(readers, plan)
        member = self._joined(readers, ranks) if by_window.any() else None
        if member is None:
            return None
        numbers, region_of = np.unique(tensor_of[by_window], return_inverse=True)
        expected_of = np.ones(len(numbers), np.int64)
        np.maximum.at(expected_of, region_of, expected[by_window])
        shared, rest = plan[by_window], plan[~by_window]
        used = sorted({self._tensors.file_of(number) for number in numbers})
        place = {number: at for at, number in enumerate(used)}
        regions = [
            self._tensors.region(int(number), place, int(count), ranks.count)
            for number, count in zip(numbers, expected_of, strict=True)
        ]
        shared["file"] = [place[number] for number in shared["file"].tolist()]
        files = [self._files[number] for number in used]

        def past(extents: Extents) -> Transfer:
            return submit_to(stream, readers, files, extents, owner)

        # First: it also places the reader threads on a memory node.
        part = submit_to(stream, readers, self._files, rest, owner) if len(rest) else None
        try:
            handle = member.submit(files, regions, shared, region_of.astype(np.uint32), stream)
            transfer = SharedTransfer(
                handle, past, files=files, nbytes=plan_bytes(plan), deadline_s=self._settings.deadline_s, owner=owner
            )
            if handle is None:  # the window cannot be used any more
                transfer.add(past(shared))
        except BaseException:
            if part is not None:
                part.cancel()
            raise
        if part is not None:
            transfer.add(part)
        return transfer

    def complete_report(self, report: LoadReport) -> None:
        """Say in an account how much was shared, and why not more."""
        if self._ranks is None:
            return
        if self._why_not:
            report.add_note(self._why_not)
        if self._member is None:
            if not self._why_not and self._takes and not any(self._takes.values()):
                report.add_note("nothing shared: reads do not wait for storage")
            return
        if self._reads is not None:
            report.bytes_read += self.bytes_read
        found = self._member.statistics()
        if not found.read_bytes and not found.shared_bytes:
            return
        met = found.most_members
        text = (
            f"of what {self._ranks.count} ranks share, read {human_bytes(found.read_bytes)} for all, "
            f"had {human_bytes(found.shared_bytes)} from others"
        )
        if met < self._ranks.count:
            text += f", {met} of them met"
        if found.left_bytes:
            text += f", {human_bytes(found.left_bytes)} were read past the window"
        if found.taken_over:
            text += f", {found.taken_over} blocks were taken over from ranks that ended or were late"
        if found.evicted:
            text += f", {found.evicted} blocks made room before all had had them"
        report.add_note(text)

    @property
    def bytes_read(self) -> int:
        """Bytes that reader threads of its own have read; native ones of the store read, and count, for it."""
        statistics = None if self._reads is None else self._reads.statistics()
        return 0 if statistics is None else statistics.bytes_read + statistics.overread_bytes

    def close(self) -> None:
        """Leave the window, before the readers are closed. Safe to call twice."""
        with self._lock:
            member, self._member = self._member, None
            copies, self._copies = self._copies, None
            self._ranks = None
        if self._reads is not None:
            self._reads.close()
        if member is not None:
            member.leave()
        if copies is not None:
            copies.close()

    def _taken(self, readers: ReaderThreads, plan: Extents) -> npt.NDArray[np.bool_]:
        numbers = np.unique(plan["file"]).tolist()
        for number in numbers:
            if number not in self._takes:
                self._takes[number] = is_worth_sharing(readers, self._files[number])
        return np.isin(plan["file"], [number for number in numbers if self._takes[number]])

    def _joined(self, readers: ReaderThreads, ranks: NodeRanks) -> WindowMember | None:
        with self._lock:
            if self._member is not None or self._ranks is None:
                return self._member
            try:
                self._member = self._join(readers, ranks)
            except (CheckpointError, OSError) as error:
                self._why_not = f"nothing shared: {error}"
                logger.debug("the window: %s", error)
                if isinstance(readers, NativeReaders):
                    readers.by_page_cache = True
            return self._member

    def _join(self, readers: ReaderThreads, ranks: NodeRanks) -> WindowMember:
        directory, why_not = meeting_directory()
        if directory is None:
            raise TransferError(why_not)
        if isinstance(readers, NativeReaders):
            copies = readers
        else:
            copies = self._copies = NativeReaders(ranks=ranks.count)
            readers = self._reads = make_readers_for(self._files, self._settings)
        return WindowMember(
            directory,
            window_bytes(int(self._settings.share_bytes)),
            timeout_s=self._settings.share_timeout_s,
            ranks=ranks.count,
            readers=readers,
            copies=copies,
            files=self._files,
        )


class _Tensors:
    """Where the tensors of a store lie, for looking up which one an extent is of."""

    def __init__(self, files: Sequence[SourceFile], infos: Iterable[TensorInfo]) -> None:
        numbers = {file.path: number for number, file in enumerate(files)}
        self._infos = sorted(
            (info for info in infos if info.nbytes), key=lambda info: (numbers[info.file], info.offset)
        )
        self._file = np.array([numbers[info.file] for info in self._infos], np.int64)
        # Offsets in all files, one behind the other.
        starts = np.cumsum([0, *(file.size for file in files)])[: len(files)]
        self._starts = starts
        self._begin = starts[self._file] + np.array([info.offset for info in self._infos], np.int64)
        self._nbytes = np.array([info.nbytes for info in self._infos], np.int64)

    def file_of(self, number: int) -> int:
        return int(self._file[number])

    def region(self, number: int, place: dict[int, int], expected: int, most: int) -> Region:
        info = self._infos[number]
        return Region(place[self.file_of(number)], info.offset, info.nbytes, expected, most)

    def wanted_by(self, plan: Extents, ranks: NodeRanks) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of each extent the number of its tensor, and how many ranks will want its bytes: 1 where it is not in one."""
        offsets = plan["offset"].astype(np.int64)
        begin = self._starts[plan["file"]] + offsets
        rows, row_bytes = plan["rows"].astype(np.int64), plan["row_bytes"].astype(np.int64)
        stride = np.where(rows > 1, plan["src_stride"].astype(np.int64), row_bytes)
        tensor = np.clip(np.searchsorted(self._begin, begin, side="right") - 1, 0, None)
        end = begin + (rows - 1) * stride + row_bytes
        inside = (begin >= self._begin[tensor]) & (end <= self._begin[tensor] + self._nbytes[tensor])
        kept = np.zeros(len(self._infos), np.int64)
        np.add.at(kept, tensor[inside], (rows * row_bytes)[inside])
        share = np.minimum(kept[tensor] / self._nbytes[tensor], 1.0)
        gapped = (rows > 1) & (stride > row_bytes) & (row_bytes < _LONG_ROW_BYTES)
        expected = np.where(gapped, ranks.count, np.rint(share * ranks.count)).astype(np.int64)
        expected[~inside | (self._nbytes[tensor] < LEAST_BYTES)] = 1
        for number in np.unique(tensor[expected > 1]).tolist():
            if ranks.is_own(self._infos[number].name):
                expected[tensor == number] = 1
        return tensor, expected
