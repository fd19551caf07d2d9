"""Which files of a key's packs are missing in the local caches."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..packs.key_packs import files_for
from ..packs.manifest import Frame, PackedFile
from ..packs.pack import Pack


@dataclass
class MissingFiles:
    """Files that are missing, by pack and frame.

    Attributes:
        files: name of a pack -> index of a frame -> the missing files in it.
        packs: name of a pack -> the pack.
        count: of files.
        bytes: of their content.
    """

    files: dict[str, dict[int, list[PackedFile]]] = field(default_factory=dict)
    packs: dict[str, Pack] = field(default_factory=dict)
    count: int = 0
    bytes: int = 0

    def add(self, pack: Pack, file: PackedFile) -> None:
        """Count a file of ``pack`` as missing."""
        name = pack.stored.name
        self.packs[name] = pack
        self.files.setdefault(name, defaultdict(list))[file.frame].append(file)
        self.count += 1
        self.bytes += file.size

    def roots(self) -> list[str]:
        """Names of the caches in which files are missing."""
        return sorted({file.root for frames in self.files.values() for files in frames.values() for file in files})

    def below(self, roots: Collection[str]) -> MissingFiles:
        """The missing files of the caches ``roots`` only."""
        if set(self.roots()) <= set(roots):
            return self
        return self.where(lambda file: file.root in roots)

    def where(self, keep: Callable[[PackedFile], bool]) -> MissingFiles:
        """The missing files for which ``keep`` returns True."""
        left = MissingFiles()
        for name, frames in self.files.items():
            for file in (file for files in frames.values() for file in files if keep(file)):
                left.add(self.packs[name], file)
        return left

    def frames(self) -> list[tuple[Pack, Frame, list[PackedFile]]]:
        """Frames with their missing files, pack by pack, so that few packs are open at a time; the largest packs and
        frames first, so that all threads end at about one time.
        """
        found: list[tuple[int, list[tuple[Pack, Frame, list[PackedFile]]]]] = []
        for name, frames in self.files.items():
            pack = self.packs[name]
            of_pack = [(pack, pack.manifest.frames[index], files) for index, files in frames.items()]
            of_pack.sort(key=lambda item: item[1].raw_size, reverse=True)
            found.append((sum(frame.raw_size for _, frame, _ in of_pack), of_pack))
        found.sort(key=lambda item: item[0], reverse=True)
        return [item for _, of_pack in found for item in of_pack]


def missing_files(
    packs: list[Pack], directories: Mapping[str, Path], without: Collection[tuple[str, int]] = frozenset()
) -> MissingFiles:
    """The files of ``packs`` that do not exist in ``directories`` (name of a cache -> its directory).

    Args:
        without: frames, each as (name of its pack, index), that are not used.
    """
    missing = MissingFiles()
    for pack, file in files_for(packs, without=without).values():
        root, _, below = file.path.partition("/")
        if root in directories and not os.path.lexists(f"{directories[root]}/{below}"):
            missing.add(pack, file)
    return missing
