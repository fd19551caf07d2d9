"""`python -m tests.engines.contract`: what moved in the engines that are installed, or in others.

    python -m tests.engines.contract                           # vLLM, SGLang and torch as they are installed
    python -m tests.engines.contract --site .venv-sglang-0.5.23/lib/python3.11/site-packages
    python -m tests.engines.contract --download vllm sglang     # the newest of the package index, for a weekly job
    python -m tests.engines.contract --download vllm==0.33.0

One line for each name, signature or behaviour that is not as the adapters expect it; the status is 1 if there are any.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PathDistribution, distributions
from pathlib import Path

from .check import check
from .source_tree import SourceTree

ENGINES = ("vllm", "sglang", "torch")


def main() -> int:
    """Print the lines; returns the status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, action="append", help="a directory that holds packages")
    parser.add_argument("--download", nargs="+", metavar="PACKAGE", help="wheels of the package index to look into")
    parser.add_argument("--quiet", action="store_true", help="no remarks: only what moved")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="contract-") as scratch:
        if given.download:
            sites = [unpacked(name, Path(scratch)) for name in given.download]
        else:
            sites = given.site or installed_sites()
        return 1 if sum(_report(site, remarks=not given.quiet) for site in sites) else 0


def _report(site: Path, *, remarks: bool) -> int:
    found = 0
    for engine in ENGINES:
        if not (site / engine / "__init__.py").exists():
            continue
        report = check(engine, SourceTree(site))
        label = f"{engine} {version_in(site, engine)}"
        for line in report.moved:
            print(f"{label}: moved: {line}")
        for line in report.remarks if remarks else ():
            print(f"{label}: {line}")
        print(f"{label}: {report.checked} checked, {len(report.moved)} moved")
        found += len(report.moved)
    return found


def installed_sites() -> list[Path]:
    """Where the engines of this Python are installed."""
    specs = (importlib.util.find_spec(engine) for engine in ENGINES)
    return list(dict.fromkeys(Path(spec.origin).parents[1] for spec in specs if spec is not None and spec.origin))


def version_in(site: Path, engine: str) -> str:
    """The version of the distribution of an engine below ``site``."""
    names = (engine, f"{engine}-cpu")
    found = {
        distribution.metadata["Name"]: distribution.version
        for distribution in distributions(path=[str(site)])
        if isinstance(distribution, PathDistribution) and distribution.metadata["Name"] in names
    }
    return next((found[name] for name in names if name in found), "?")


def unpacked(package: str, scratch: Path) -> Path:
    """The Python files of the newest wheel of ``package``, or of the version that it names.

    Raises:
        subprocess.CalledProcessError: there is none for this machine.
    """
    with _wheel(package, scratch) as wheel:
        site = scratch / wheel.stem
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site, [name for name in archive.namelist() if name.endswith((".py", "/METADATA"))])
    return site


@contextmanager
def _wheel(package: str, scratch: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", directory, package], check=True)
        yield next(Path(directory).glob("*.whl"))


if __name__ == "__main__":
    sys.exit(main())
