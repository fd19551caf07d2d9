"""The manifest of a pack: its key, its files, its frames; and every check of it, each with an error of its own."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from ..cache_errors import CacheValidationError
from ..host.groups import HostGroup
from ..key import CacheKey
from .tar import header, header_size, padding

FORMAT = 2
MOST_FILES = 1_000_000
MOST_BYTES = 1 << 40
MOST_FRAME_BYTES = 1 << 33
MOST_PATH_CHARS = 1024
ANY_HOST = -1
_SHA256 = re.compile(r"[0-9a-f]{64}")


class PackedFile(NamedTuple):
    """One file of a pack.

    Attributes:
        path: "<root>/<path below it>"; the roots are those of directories.py.
        size: bytes of content; 0 for a link.
        mode: permission bits.
        sha256: of the content, hexadecimal; empty for a link.
        frame: which frame holds it.
        offset: where in that frame's decompressed bytes the tar header begins.
        link: the target if it is a symbolic link, else empty.
        host: index of the manifest's host group that the file holds for; ANY_HOST: for any.
    """

    path: str
    size: int
    mtime_ns: int
    mode: int
    sha256: str
    frame: int
    offset: int
    link: str = ""
    host: int = ANY_HOST

    @property
    def root(self) -> str:
        """The name of the cache that the file belongs to."""
        return self.path.partition("/")[0]

    def head(self) -> bytes:
        """The tar header that stands at ``offset``."""
        return header(self.path, self.size, self.mtime_ns, self.mode, self.link)

    def packed_size(self) -> int:
        """How many bytes it takes in its frame: the header, the content, and what fills the last block."""
        return header_size(self.path, self.mtime_ns, self.link) + self.size + padding(self.size)


class Frame(NamedTuple):
    """One zstd frame of a pack: where it lies, and what its bytes must be."""

    offset: int
    size: int
    raw_size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything about a pack but the content of its files.

    Attributes:
        key: the environment and the scope that the pack was made for.
        created: seconds since the epoch.
        host: where it was made; for people.
        roots: name of a cache -> its directory where the pack was made (Triton's files name it).
        factors: path of a `cache_key_factors.json` -> the engine's own account of its key.
        replaces: names of the packs whose files are all in this one (it is a compaction).
        hosts: groups of host facts that files depend on; the files' ``host`` points into them.
        generation: counts up where the name of an equal pack is taken by a damaged one.
    """

    key: CacheKey
    created: float
    files: tuple[PackedFile, ...]
    frames: tuple[Frame, ...]
    host: str = ""
    roots: Mapping[str, str] = field(default_factory=dict)
    factors: Mapping[str, Any] = field(default_factory=dict)
    replaces: tuple[str, ...] = ()
    hosts: tuple[HostGroup, ...] = ()
    generation: int = 0

    @cached_property
    def digest(self) -> str:
        """The digest of the content, which names the pack: equal for equal files of a key, whoever saves them."""
        return content_digest(self.key, self.files, [group.hash for group in self.hosts], self.generation)

    @property
    def names(self) -> tuple[str, ...]:
        """The digest, and that of the first generation of the same content, by which a deny-list may know it."""
        if not self.generation:
            return (self.digest,)
        return self.digest, content_digest(self.key, self.files, [group.hash for group in self.hosts])

    def host_of(self, file: PackedFile) -> str:
        """The hash of the host group that a file holds for; empty: for any."""
        return "" if file.host == ANY_HOST else self.hosts[file.host].hash

    @property
    def frames_bytes(self) -> int:
        """Where the last frame ends in the pack."""
        return self.frames[-1].offset + self.frames[-1].size if self.frames else 0

    @property
    def content_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    def to_json(self) -> bytes:
        value = {
            "format": FORMAT,
            "key": self.key.to_json(),
            "created": self.created,
            "host": self.host,
            "roots": dict(self.roots),
            "factors": dict(self.factors),
            "replaces": list(self.replaces),
            "hosts": self.hosts,
            "generation": self.generation,
            "frames": self.frames,
            "files": self.files,
        }
        return json.dumps(value, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes, location: str) -> Manifest:
        """Read and check.

        Raises:
            CacheValidationError: it is not a manifest, or has values that no pack of ours has; the message begins with
                ``location``.
        """
        try:
            value = json.loads(text)
            if value["format"] != FORMAT:
                raise CacheValidationError(
                    f"{location}: its format is {value['format']!r}, this version reads {FORMAT}"
                )
            manifest = cls(
                key=CacheKey.from_json(value["key"]),
                created=float(value["created"]),
                host=str(value["host"]),
                roots={str(name): str(path) for name, path in value["roots"].items()},
                factors=dict(value["factors"]),
                replaces=tuple(map(str, value["replaces"])),
                hosts=tuple(_host(row) for row in value["hosts"]),
                generation=int(value["generation"]),
                frames=tuple(_frame(row) for row in value["frames"]),
                files=tuple(_file(row) for row in value["files"]),
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CacheValidationError(
                f"{location}: its manifest cannot be read: {type(error).__name__}: {error}"
            ) from None
        if not math.isfinite(manifest.created):
            raise CacheValidationError(f"{location}: its manifest cannot be read: it was made at {manifest.created}")
        manifest.check(location)
        return manifest

    def check(self, location: str) -> None:
        """Refuse paths that leave a cache, and sizes that the pack does not have.

        Raises:
            CacheValidationError: the message begins with ``location``.
        """
        if len(self.files) > MOST_FILES or self.content_bytes > MOST_BYTES:
            raise CacheValidationError(f"{location}: too large: {len(self.files)} files, {self.content_bytes} bytes")
        seen: set[tuple[str, int]] = set()
        for file in self.files:
            if reason := _unsafe(file):
                raise CacheValidationError(f"{location}: {reason}")
            if not ANY_HOST <= file.host < len(self.hosts):
                raise CacheValidationError(f"{location}: {file.path!r} is for a host that the manifest does not name")
            if (file.path, file.host) in seen:
                raise CacheValidationError(f"{location}: the path {file.path!r} is there twice")
            seen.add((file.path, file.host))
        self._check_nesting({path for path, _ in seen}, location)
        self._check_frames(location)

    def _check_nesting(self, paths: set[str], location: str) -> None:
        """Refuse files that lie below a file or a link."""
        for directory in {path.rpartition("/")[0] for path in paths}:
            above = directory
            while above:
                if above in paths:
                    path = min(path for path in paths if path.startswith(f"{directory}/"))
                    kind = "link" if any(file.link for file in self.files if file.path == above) else "file"
                    raise CacheValidationError(f"{location}: {path!r} lies below {above!r}, which is a {kind}")
                above = above.rpartition("/")[0]

    def _check_frames(self, location: str) -> None:
        """Refuse gaps: files lie one behind another in their frames, and frames in the pack."""
        ends = [0] * len(self.frames)
        for file in self.files:
            if not 0 <= file.frame < len(self.frames) or file.offset != ends[file.frame]:
                raise CacheValidationError(f"{location}: {file.path!r} does not lie where the file before it ends")
            ends[file.frame] += file.packed_size()
        position = 0
        for frame, end in zip(self.frames, ends, strict=True):
            if frame.raw_size != end or frame.offset != position:
                raise CacheValidationError(
                    f"{location}: the frame at byte {frame.offset} does not hold what its files need"
                )
            position += frame.size


def content_digest(key: CacheKey, files: Iterable[tuple[Any, ...]], hosts: list[str], generation: int = 0) -> str:
    """The digest over what a pack holds, without times, frames and who made it.

    Args:
        files: rows of a manifest.
        hosts: hashes of the host groups that the rows point into.
    """
    rows = sorted(
        (row[0], row[1], row[3], row[4], row[7], "" if row[8] == ANY_HOST else hosts[row[8]]) for row in files
    )
    value = {"format": FORMAT, "key": key.to_json(), "generation": generation, "files": rows}
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _unsafe(file: PackedFile) -> str | None:
    """Why a file of a manifest is refused, or None."""
    if reason := unsafe_path(file.path):
        return f"the path {file.path!r} is refused: {reason}"
    if file.mode & ~0o777:
        return f"{file.path!r} has the mode {file.mode:o}: set-uid and the like are refused"
    if file.link and (reason := unsafe_link(file.path, file.link)):
        return f"the link {file.path!r} -> {file.link!r} is refused: {reason}"
    if file.link and file.size:
        return f"the link {file.path!r} has a content"
    return None


def unsafe_path(path: str) -> str | None:
    """Why a path in a pack is refused, or None."""
    if not path or len(path) > MOST_PATH_CHARS:
        return "it is empty or too long"
    if path.startswith("/"):
        return "it is absolute"
    if not _is_plain(path):
        return "it has characters that no cache uses"
    parts = path.split("/")
    if len(parts) < 2:
        return "it names no cache"
    if any(part in ("", ".", "..") for part in parts):
        return "it has empty parts, `.` or `..`"
    return None


def _is_plain(path: str) -> bool:
    """No NUL, no backslash, and nothing that a file's name cannot hold."""
    try:
        path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return "\0" not in path and "\\" not in path


def unsafe_link(path: str, target: str) -> str | None:
    """Why a symbolic link in a pack is refused, or None.

    It may only point into its own directory or further down. So no chain of links leaves that directory, whatever
    they are to each other, in this pack or in another.
    """
    if target.startswith("/"):
        return "its target is absolute"
    if not _is_plain(target) or len(target) > MOST_PATH_CHARS:
        return "its target is not a path"
    if path.count("/") < 1 or ".." in target.split("/"):
        return "it leaves its directory"
    return None


def _file(row: Any) -> PackedFile:
    file = PackedFile(*row)
    numbers = (file.size, file.mtime_ns, file.mode, file.frame, file.offset, file.host + 1)
    texts = (file.path, file.sha256, file.link)
    if not all(type(value) is int and 0 <= value < 1 << 63 for value in numbers):
        raise ValueError(f"a file's row is {row!r}")
    if type(file.host) is not int or file.host < ANY_HOST:
        raise ValueError(f"a file's row is {row!r}")
    if not all(type(text) is str for text in texts):
        raise ValueError(f"a file's row is {row!r}")
    if not (file.link and not file.sha256) and not _SHA256.fullmatch(file.sha256):
        raise ValueError(f"a file's digest is {file.sha256!r}")
    return file


def _host(row: Any) -> HostGroup:
    digest, parts = row
    group = HostGroup.of({str(name): str(text) for name, text in parts})
    if digest != group.hash:
        raise ValueError(f"the host group {digest!r} has the parts of another")
    return group


def _frame(row: Any) -> Frame:
    frame = Frame(*row)
    if not all(type(value) is int and 0 <= value < 1 << 63 for value in frame[:3]):
        raise ValueError(f"a frame's row is {row!r}")
    if not _SHA256.fullmatch(frame.sha256):
        raise ValueError(f"a frame's row is {row!r}")
    if frame.raw_size > MOST_FRAME_BYTES:
        raise ValueError(f"a frame of {frame.raw_size} bytes is larger than any that is written")
    return frame
