"""Tries the wheel for aarch64 on a machine of another kind: its import, its command and its native reader threads.

python -m scripts.try_foreign_wheel WHEEL        (make test-wheel-arm)

Needs qemu-aarch64-static (Debian's package qemu-user-static) and Debian's apt-get and dpkg, by which Python and the
libraries that it needs come for aarch64, into a directory that is removed again: nothing of this machine is changed.
torch stays away, since importing it takes many minutes there; bytes are read into numpy's arrays.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

EMULATOR = "qemu-aarch64-static"
PYTHON = "python3.11"  # Debian 12's
DEBIAN = (
    f"{PYTHON}-minimal lib{PYTHON}-minimal lib{PYTHON}-stdlib libc6 libgcc-s1 libstdc++6 libffi8 zlib1g libssl3 "
    "libexpat1 libbz2-1.0 liblzma5 libuuid1"
).split()
TIMEOUT_S = 300
READ = """
import contextlib, platform, sys
import numpy as np
import engine_loader
from engine_loader.sources.posix import PosixSource
from engine_loader.transfer.modes import ReadMode
from engine_loader.transfer.native import native_readers
from engine_loader.transfer.plan import make_extents

path = sys.argv[1]
content = np.random.default_rng(1).integers(0, 256, 3_000_001, dtype=np.uint8)
content.tofile(path)
whole, rows, row, stride = 2_000_000, 70, 500, 30_011
wanted = [content[12_345 : 12_345 + whole]] + [content[7 + i * stride :][:row] for i in range(rows)]
for mode in ("buffered", "direct", "mixed"):
    native_readers.choose_mode = lambda *_: ReadMode(mode, False, "for this trial")
    to = np.full(whole + rows * row, 0xA5, np.uint8)
    plan = make_extents([(0, 1, 12_345, whole, 0, 0, whole), (0, rows, 7, row, stride, whole, row)])
    plan["address"] += np.uint64(to.ctypes.data)
    readers = native_readers.NativeReaders(2, block_bytes=1 << 16)
    with contextlib.closing(PosixSource().open(path)) as file, contextlib.closing(readers):
        transfer = readers.submit([file], plan, ordered=True)
        assert transfer.wait() and transfer.bytes_done == to.nbytes, transfer.bytes_done
    assert np.array_equal(to, np.concatenate(wanted)), mode
print(f"{platform.machine()}, Python {platform.python_version()}, engine_loader {engine_loader.__version__}")
"""


def fetch_system(directory: Path, root: Path) -> None:
    """Python for aarch64 and its libraries into ``root``, with apt's lists in ``directory``."""
    for name in ("lists/partial", "cache/archives/partial"):
        (directory / name).mkdir(parents=True)
    (directory / "status").touch()
    apt = ["apt-get", "-qq", "-o", "APT::Architecture=arm64", "-o", "APT::Architectures=arm64"]
    apt += ["-o", f"Dir::State::lists={directory}/lists", "-o", f"Dir::Cache={directory}/cache"]
    apt += ["-o", f"Dir::State::status={directory}/status", "-o", "APT::Sandbox::User=root"]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "download", *DEBIAN], check=True, cwd=directory)
    for package in sorted(directory.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(root)], check=True)


def fetch_packages(wheel: Path, directory: Path, site: Path) -> None:
    """The wheel unpacked into ``site``, and what it asks for, except torch, into ``directory``."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    metadata = next(site.glob("engine_loader-*.dist-info/METADATA")).read_text()
    asked = [one for one in re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, re.MULTILINE) if "torch" not in one]
    tags = [f"--platform=manylinux_{version}_aarch64" for version in ("2_28", "2_27", "2_17")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--implementation=cp"]
    version = PYTHON.removeprefix("python")
    pip += [*tags, "--platform=manylinux2014_aarch64", f"--python-version={version}", f"--target={directory}"]
    subprocess.run([*pip, *asked], check=True)


def main() -> None:
    wheel = Path(sys.argv[1]).resolve()
    if not wheel.name.endswith("_aarch64.whl"):
        sys.exit(f"{wheel.name} is not for aarch64")
    for program in (EMULATOR, "apt-get", "dpkg"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is needed, and is not installed")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        root, site, packages = directory / "root", directory / "site", directory / "packages"
        fetch_system(directory / "apt", root)
        fetch_packages(wheel, packages, site)
        libraries = f"{root}/lib/aarch64-linux-gnu:{root}/usr/lib/aarch64-linux-gnu"
        inside = {
            "PYTHONHOME": f"{root}/usr",
            "PYTHONPATH": f"{site}:{packages}",
            "LD_LIBRARY_PATH": libraries,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        variables = [word for name, value in inside.items() for word in ("-E", f"{name}={value}")]
        python = [EMULATOR, "-L", str(root), *variables, f"{root}/usr/bin/{PYTHON}"]
        outside = {"PATH": os.environ["PATH"], "HOME": scratch}
        for command in (["-m", "engine_loader", "--version"], ["-c", READ, f"{scratch}/bytes"]):
            subprocess.run([*python, *command], check=True, cwd=scratch, env=outside, timeout=TIMEOUT_S)
        print("ok: import, --version, native reader threads: buffered, by O_DIRECT, mixed")


if __name__ == "__main__":
    main()
