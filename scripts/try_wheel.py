"""Tries a wheel as its users will: in a clean environment, without a compiler, as a user without rights or a home.

python -m scripts.try_wheel WHEEL [ARGUMENTS OF pip ...]        (make test-wheel)

Each trial starts a process that has nothing but the environment's programs in its PATH. What is measured (size, time to
import) is printed; only what fails ends the program.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

NOBODY = 65534
LOAD = """
import sys
from engine_loader import open_checkpoint
with open_checkpoint(sys.argv[1], engine=sys.argv[2]) as checkpoint:
    found = {name: tensor.tolist() for name, tensor in checkpoint.tensors()}
assert found == {"a": [0.0, 1.0, 2.0, 3.0], "b": [7]}, found
"""
IMPORT = "import time; began = time.process_time(); import engine_loader; print(time.process_time() - began)"
SIZE = """
from importlib.metadata import files
print(sum(file.size or 0 for file in files("engine-loader")))
"""


def write_checkpoint(path: Path) -> None:
    """A file of two tensors, written by hand: nothing here depends on the package safetensors."""
    header = {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "I64", "shape": [1], "data_offsets": [16, 24]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<4fq", 0, 1, 2, 3, 7))


class Environment:
    """A clean virtual environment with a wheel in it, and no compiler."""

    def __init__(self, directory: Path, wheel: Path, pip_arguments: list[str]) -> None:
        self._bin = directory / "bin"
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        pip = [str(self._bin / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*pip, *pip_arguments, str(wheel)], check=False).returncode != 0:
            sys.exit(
                f"{sys.executable}: pip cannot install {' '.join([*pip_arguments, wheel.name])}; where there is no "
                "such build of torch for this Python, name another: make test-wheel TORCH=torch==2.13.0"
            )

    def no_other_user(self) -> str | None:
        """Why nothing can be tried as nobody, or None."""
        if os.geteuid() != 0:
            return "this is not root"
        python = str(self._bin / "python")
        try:
            subprocess.run([python, "-c", ""], user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", check=True)
        except (OSError, subprocess.CalledProcessError):
            return f"nobody may not run {os.path.realpath(python)}"
        return None

    def run(self, *command: str, variables: Mapping[str, str] | None = None, nobody: bool = False) -> str:
        """What a program of the environment prints; ends this program where that one fails."""
        done = subprocess.run(
            [str(self._bin / command[0]), *command[1:]],
            env={"PATH": str(self._bin), **(variables or {})},
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            user=NOBODY if nobody else None,
            group=NOBODY if nobody else None,
            extra_groups=[] if nobody else None,
        )
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)} with {variables}: status {done.returncode}\n{done.stdout}")
        return done.stdout


def surroundings(directory: Path, environment: Environment) -> Iterator[tuple[str, dict[str, str], bool]]:
    """(what it is, variables, as nobody) of every way in which the package is tried."""
    home = directory / "home"
    home.mkdir(mode=0o755)
    read_only = directory / "read-only"
    read_only.mkdir(mode=0o555)
    yield "as this user", {"HOME": str(home)}, False
    yield "HOME unset", {}, False
    if reason := environment.no_other_user():
        print(f"not tried as another user: {reason}")
        return
    yield "as nobody, HOME unset", {}, True
    yield "as nobody, HOME read-only", {"HOME": str(read_only)}, True
    yield "as nobody, HOME missing", {"HOME": str(directory / "missing")}, True


def main() -> None:
    wheel, *pip_arguments = sys.argv[1:]
    tag = sysconfig.get_platform().removeprefix("linux-")
    if not wheel.endswith((f"{tag}.whl", "-any.whl")):
        sys.exit(f"{wheel} is not for this machine ({tag})")
    engine = "python" if wheel.endswith("-any.whl") else "cpp"
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        directory.chmod(0o755)
        environment = Environment(directory / "environment", Path(wheel).resolve(), pip_arguments)
        weights = directory / "model.safetensors"
        write_checkpoint(weights)
        version = environment.run("engine-loader", "--version").strip()
        assert f"-{version.split()[1]}-" in wheel, version
        for what, variables, nobody in surroundings(directory, environment):
            environment.run("python", "-c", LOAD, str(weights), engine, variables=variables, nobody=nobody)
            shown = environment.run("engine-loader", "inspect", str(weights), variables=variables, nobody=nobody)
            assert re.search(r"\b2 tensors\b", shown), shown
            report = environment.run("engine-loader", "settings", variables=variables, nobody=nobody)
            assert "loader.engine" in report, report
            print(f"ok: {what}: import, {engine} reader threads, inspect, settings", flush=True)
        times = [float(environment.run("python", "-c", IMPORT)) for _ in range(7)]
        size = int(environment.run("python", "-c", SIZE))
        python = environment.run("python", "--version").strip()
        print(
            f"{version}, {python}: {Path(wheel).stat().st_size:,} bytes, {size:,} installed, "
            f"import {statistics.median(times) * 1000:.0f} ms of processor time (median of 7)"
        )


if __name__ == "__main__":
    main()
