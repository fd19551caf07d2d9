"""Compiles what the native tests need: the library when it is missing or old, the fault shim, the sanitizer driver."""

from __future__ import annotations

import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine_loader.transfer.native_library import library_path

HERE = Path(__file__).parent
NATIVE = library_path().parent
FLAGS = ["-std=c++17", "-fPIC", "-pthread", "-Wall", "-Wextra"]


def sources() -> list[Path]:
    return sorted(NATIVE.glob("*.cpp"))


def ensure_library() -> None:
    """Compile the library unless one is there that is younger than its sources."""
    library = library_path()
    newest = max(path.stat().st_mtime for path in [*sources(), *NATIVE.glob("*.h")])
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


def compile_driver(folder: Path, sanitizers: str) -> Path:
    """The driver with the engine, whose preadv is the driver's; kept in ``folder`` until something changes."""
    inputs = [*sources(), *NATIVE.glob("*.h"), HERE / "driver.cpp"]
    digest = hashlib.sha256(sanitizers.encode() + b"".join(path.read_bytes() for path in inputs)).hexdigest()[:16]
    kind = sanitizers.replace(",", "-")
    driver = folder / f"driver-{kind}-{digest}"
    if driver.exists():
        return driver
    for old in folder.glob(f"driver-{kind}-*"):
        old.unlink()
    flags = ["-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-I{NATIVE}"]

    def compile_one(source: Path) -> str:
        target = folder / f"{digest}-{source.stem}.o"
        faulty = [] if source.name == "driver.cpp" else ["-Dpreadv=faulty_preadv"]
        _compile([*flags, *faulty, "-c", str(source)], target)
        return str(target)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [HERE / "driver.cpp", *sources()]))
    _compile([*flags, *objects], driver)
    for name in objects:
        os.unlink(name)
    return driver


def _compile(arguments: list[str], target: Path) -> None:
    done = subprocess.run(["c++", *FLAGS, *arguments, "-o", str(target)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
