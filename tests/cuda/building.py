"""Compiles the stand-in for the CUDA runtime, the driver over it, and native libraries with a fault put in."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.transfer.native.building import NATIVE, compile_driver, compile_library, compile_object, link, native_objects

HERE = Path(__file__).parent
STANDIN = HERE / "standin" / "standin.cpp"
CUFILE = HERE / "standin" / "cufile.cpp"
_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra"]


@dataclass(frozen=True)
class Mutant:
    """The native library with a rule taken out.

    Attributes:
        name: what is wrong with it.
        caught_by: the driver's scenario that must see it.
        source: of the library, without its suffix.
        changes: what stands there -> what the mutant has instead.
    """

    name: str
    caught_by: str
    source: str
    changes: dict[str, str]


@dataclass(frozen=True)
class Drivers:
    """Makes drivers in ``folder``, of objects that are kept in ``kept``."""

    kept: Path
    folder: Path
    sanitizers: str
    source: Path = HERE / "driver.cpp"

    @property
    def standin(self) -> Path:
        """The stand-in, compiled with the sanitizers."""
        library = self.folder / "libstandin.so"
        if not library.exists():
            compile_library(STANDIN, library, self.sanitizers)
        return library

    def make(self, mutant: Mutant | None = None) -> Path:
        """The driver with the native library, or with a mutant of it."""
        driver = self.folder / (mutant.name if mutant else "driver")
        if driver.exists():
            return driver
        objects = native_objects(self.kept, self.sanitizers)
        if mutant is not None:
            objects[mutant.source] = self._mutate(mutant)
        own = compile_driver(self.kept, self.sanitizers, self.source)
        link([own, *objects.values(), self.standin], driver, self.sanitizers, f"-Wl,-rpath,{self.folder}", "-rdynamic")
        return driver

    def _mutate(self, mutant: Mutant) -> Path:
        text = next(NATIVE.glob(f"*/{mutant.source}.cpp")).read_text()
        for before, after in mutant.changes.items():
            assert text.count(before) == 1, f"{mutant.name}: the source has changed, and so must the mutant: {before!r}"
            text = text.replace(before, after)
        source = self.folder / f"{mutant.name}.cpp"
        source.write_text(text)
        compiled = source.with_suffix(".o")
        compile_object(source, compiled, self.sanitizers)
        return compiled


def compile_standin(folder: Path) -> Path:
    """The stand-in for use from Python."""
    return _compile(folder / "libstandin.so", STANDIN)


def compile_cufile(folder: Path) -> Path:
    """The stand-ins for the runtime and for cuFile in one library, under the names that fastsafetensors looks for.

    Returns:
        the library, for StandIn.
    """
    library = _compile(folder / "libcudart.so", STANDIN, CUFILE)
    (folder / "libcufile.so.0").symlink_to(library)
    return library


def _compile(library: Path, *sources: Path) -> Path:
    subprocess.run(["c++", *_FLAGS, *map(str, sources), "-o", str(library)], check=True)
    return library


def found_by(run: Callable[[int], subprocess.CompletedProcess[str]], tries: int) -> str:
    """What a driver said of a mutant in the first of ``tries`` runs that noticed it; ``run`` is given their numbers."""
    for number in range(tries):
        try:
            done = run(number)
        except subprocess.TimeoutExpired:  # broken reader threads may also wait for ever
            continue
        if done.returncode != 0:
            return done.stderr
    return f"not seen in {tries} tries"
