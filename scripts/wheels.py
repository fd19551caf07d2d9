"""Builds what a release consists of: the sdist, and a wheel for each platform.

python -m scripts.wheels [DIRECTORY]        (make wheels: into dist/)

Wheels are built from the sdist, so that what it lacks is noticed. Zig is the compiler (the package `ziglang`): it
brings the headers of an old glibc for both platforms, and links C++'s own library into ours, so that a wheel needs
nothing of the system but glibc. Each wheel is then looked at: its tag, which libraries it asks for, and from which
glibc on.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

ROOT = Path(__file__).resolve().parent.parent
GLIBC = (2, 28)
"""The oldest glibc that the wheels run on: statx() is in it, and torch 2.13's own wheel needs it."""
MACHINES = {"x86_64": "EM_X86_64", "aarch64": "EM_AARCH64"}
LIBRARY = "engine_loader/transfer/native/libengine_loader_native.so"
OF_GLIBC = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2"} | {
    "ld-linux-aarch64.so.1"
}
LARGEST_WHEEL = 4 << 20


def platform_tag(machine: str) -> str:
    return f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"


def build(kind: str, sources: Path, out: Path, environment: Mapping[str, str], *options: str) -> Path:
    """Build ``kind`` (sdist or wheel) of a source tree with the build backend of this environment."""
    before = set(out.iterdir())
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out), *options]
    done = subprocess.run(
        [*command, str(sources)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\nthe {kind} could not be built: what the build said is above")
    (made,) = set(out.iterdir()) - before
    return made


def unpack(sdist: Path, directory: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(directory, filter="data")
    (tree,) = directory.iterdir()
    return tree


def build_wheel(sdist: Path, out: Path, machine: str) -> Path:
    """A wheel of the sdist for machines of one kind."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = unpack(sdist, Path(scratch))
        target = f"{machine}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
        environment = {
            "ENGINE_LOADER_NATIVE_BUILD": "require",
            "CXX": f"{sys.executable} -m ziglang c++ -target {target}",
            "CXXFLAGS": "-s",
        }
        return build("wheel", tree, out, environment, f"-C--build-option=--plat-name={platform_tag(machine)}")


def needed_glibc(elf: ELFFile) -> tuple[int, ...]:
    """The newest version of glibc's symbols that a library asks for."""
    versions: list[tuple[int, ...]] = [(0,)]
    for section in elf.iter_sections():
        if isinstance(section, GNUVerNeedSection):
            for _, wanted in section.iter_versions():
                names = [one.name for one in wanted if one.name.startswith("GLIBC_")]
                versions += [tuple(map(int, name.removeprefix("GLIBC_").split("."))) for name in names]
    return max(versions)


def check(wheel: Path, machine: str) -> str:
    """What a wheel with a library is, in one line; ends the program where that is not what its name says."""
    tag = f"py3-none-{platform_tag(machine)}"
    if not wheel.name.endswith(f"-{tag}.whl"):
        sys.exit(f"{wheel.name} is not tagged {tag}")
    with zipfile.ZipFile(wheel) as archive:
        elf = ELFFile(io.BytesIO(archive.read(LIBRARY)))
        installed = sum(entry.file_size for entry in archive.infolist())
    if elf["e_machine"] != MACHINES[machine]:
        sys.exit(f"{wheel.name} holds a library for {elf['e_machine']}")
    dynamic = elf.get_section_by_name(".dynamic")
    assert isinstance(dynamic, DynamicSection)
    libraries = {entry.needed for entry in dynamic.iter_tags("DT_NEEDED")}
    if libraries - OF_GLIBC:
        sys.exit(f"{wheel.name} needs {', '.join(sorted(libraries - OF_GLIBC))}, which is not glibc's")
    glibc = needed_glibc(elf)
    if glibc > GLIBC:
        sys.exit(f"{wheel.name} needs glibc {'.'.join(map(str, glibc))}, and is tagged for {GLIBC[0]}.{GLIBC[1]}")
    size = wheel.stat().st_size
    if size > LARGEST_WHEEL:
        sys.exit(f"{wheel.name} has {size:,} bytes, which is more than {LARGEST_WHEEL:,}")
    return (
        f"{wheel.name}: {size:,} bytes, {installed:,} installed; glibc {'.'.join(map(str, glibc))} and newer; "
        f"needs {', '.join(sorted(libraries))}"
    )


def audit(wheel: Path) -> None:
    """auditwheel's own word on the tag."""
    done = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", str(wheel)], capture_output=True, text=True, check=False
    )
    said = " ".join(done.stdout.split())
    machine = wheel.stem.rpartition(f"{GLIBC[1]}_")[2]
    if done.returncode != 0 or "manylinux_" not in said:
        sys.exit(f"auditwheel does not know {wheel.name} as a wheel for {machine}:\n{done.stdout}{done.stderr}")
    print(f"  auditwheel: {said}")


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist").resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("engine_loader-*.whl"), *out.glob("engine_loader-*.tar.gz")):
        old.unlink()
    sdist = build("sdist", ROOT, out, {})
    print(f"{sdist.name}: {sdist.stat().st_size:,} bytes", flush=True)
    for machine in MACHINES:
        wheel = build_wheel(sdist, out, machine)
        print(check(wheel, machine), flush=True)
        audit(wheel)


if __name__ == "__main__":
    main()
