"""Compiles what the native tests need: the library when it is missing or old, the fault shim, the sanitizer driver."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from engine_loader.transfer.native.library import library_path

HERE = Path(__file__).parent
NATIVE = library_path().parent / "src"
FLAGS = ["-std=c++17", "-fPIC", "-pthread", "-Wall", "-Wextra", f"-I{NATIVE}"]


def sources() -> list[Path]:
    return sorted(NATIVE.glob("*/*.cpp"))


def ensure_library() -> None:
    """Compile the library unless one is there that is younger than its sources."""
    library = library_path()
    newest = max(path.stat().st_mtime for path in [*sources(), *NATIVE.glob("*/*.h")])
    if library.exists() and library.stat().st_mtime >= newest:
        return
    unfinished = library.with_suffix(f".{os.getpid()}.tmp")
    _compile(["-O3", "-shared", "-fvisibility=hidden", *map(str, sources())], unfinished)
    unfinished.replace(library)


def compile_shim(folder: Path) -> Path:
    shim = folder / "faults.so"
    command = ["cc", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", str(HERE / "shim" / "faults.c"), "-o", str(shim)]
    subprocess.run(command, check=True)
    return shim


def native_objects(folder: Path, sanitizers: str) -> dict[str, Path]:
    """The library's object files by the names of their sources, its preadv that of the driver's (random_plans.h).

    They are kept in ``folder`` until a source changes.
    """
    inputs = [*sources(), *NATIVE.glob("*/*.h")]
    with _kept(folder, f"readers-{sanitizers.replace(',', '-')}", inputs) as kept:
        if not kept.exists():
            unfinished = kept.with_suffix(".tmp")
            unfinished.mkdir(exist_ok=True)

            def compile_one(source: Path) -> None:
                compile_object(source, unfinished / f"{source.stem}.o", sanitizers)

            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                list(pool.map(compile_one, sources()))
            unfinished.rename(kept)
    return {source.stem: kept / f"{source.stem}.o" for source in sources()}


def compile_object(source: Path, target: Path, sanitizers: str) -> None:
    """One of the library's sources, wherever it lies."""
    _compile([*_sanitized(sanitizers), "-Dpreadv=faulty_preadv", "-c", str(source)], target)


def compile_driver(folder: Path, sanitizers: str, driver: Path = HERE / "driver.cpp") -> Path:
    """A driver, not yet linked; kept in ``folder`` until something changes."""
    inputs = [driver, HERE / "random_plans.h", *NATIVE.glob("*/*.h"), *driver.parent.glob("*/*.h")]
    with _kept(folder, f"{driver.stem}-{driver.parent.name}-{sanitizers.replace(',', '-')}", inputs) as kept:
        if not kept.exists():
            unfinished = kept.with_suffix(".tmp")
            _compile([*_sanitized(sanitizers), "-c", str(driver)], unfinished)
            unfinished.rename(kept)
    return kept


def link(objects: Iterable[Path], program: Path, sanitizers: str, *options: str) -> None:
    _compile([*_sanitized(sanitizers), *map(str, objects), *options, "-ldl"], program)


def compile_library(source: Path, library: Path, sanitizers: str) -> None:
    _compile([*_sanitized(sanitizers), "-shared", str(source)], library)


def _sanitized(sanitizers: str) -> list[str]:
    return ["-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]


@contextmanager
def _kept(folder: Path, name: str, inputs: Iterable[Path]) -> Iterator[Path]:
    """Where what is made of ``inputs`` is kept, for one process at a time; what was made of others is gone."""
    content = b"".join(path.name.encode() + path.read_bytes() for path in sorted(inputs))
    kept = folder / f"{name}-{hashlib.sha256(content).hexdigest()[:16]}"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for old in folder.glob(f"{name}-*"):
            if old != kept and old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            elif old != kept:
                old.unlink(missing_ok=True)
        yield kept


def _compile(arguments: list[str], target: Path) -> None:
    done = subprocess.run(["c++", *FLAGS, *arguments, "-o", str(target)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
