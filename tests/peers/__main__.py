"""Downloads the suites, runs them and prints a table; status 1 where a test fails that is not accounted for."""

import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from tests.support.threefs import clean_emulator

from .suites import SUITES, Suite

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".peers"
_PRIVATE = re.compile(r"has no attribute '(_\w+)'|cannot import name '(_\w+)'")


@dataclass
class Result:
    """What became of the tests of one file."""

    passed: int = 0
    skipped: int = 0
    private: Counter[str] = field(default_factory=Counter)
    on_purpose: Counter[str] = field(default_factory=Counter)
    other: dict[str, str] = field(default_factory=dict)


def fetch(suite: Suite) -> Path:
    """The unpacked source distribution. pip asks a distribution for its metadata, for which that of Rust would need
    its compiler: backends/ stands in for it."""
    stem = f"{suite.distribution.replace('-', '_')}-{suite.version}"
    if not (HOME / stem).is_dir():
        isolation = ["--no-build-isolation"] if suite.distribution == "safetensors" else []
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(HOME), *isolation]
        command += ["--no-binary", suite.distribution, f"{suite.distribution}=={suite.version}"]
        backends = str(Path(__file__).parent / "backends")
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": backends})
        with tarfile.open(HOME / f"{stem}.tar.gz") as archive:
            archive.extractall(HOME, filter="data")
    return HOME / stem


def run(suite: Suite, directory: Path, environment: dict[str, str]) -> dict[str, Result]:
    """Run a suite in a process of its own, and sort what fails; by file."""
    report = HOME / "report.xml"
    report.unlink(missing_ok=True)
    paths = [directory / path for path in suite.tests]
    # -P: some distributions have a package `tests`, too.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", suite.plugin, "-p", "no:cacheprovider"]
    command.append("--continue-on-collection-errors")
    command += ["--import-mode=importlib", "-c", os.devnull, f"--rootdir={paths[0].parent}", "--timeout=120"]
    command += [f"--junitxml={report}", *map(str, paths)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    # Tests write below the directory that has tests/, as their authors run them.
    subprocess.run(command, check=False, env=environment, cwd=paths[0].parents[1], stdout=subprocess.DEVNULL)
    results = {path.stem: Result() for path in paths}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        count(case, name, results[next(stem for stem in results if stem in name.split("."))], suite)
    return results


def count(case: ElementTree.Element, name: str, result: Result, suite: Suite) -> None:
    """Add what became of one test."""
    failed = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
    if failed is None:
        result.skipped += case.find("skipped") is not None
        result.passed += case.find("skipped") is None
        return
    private = _PRIVATE.search(f"{failed.get('message')}\n{failed.text}")
    reason = next((why for part, why in suite.on_purpose.items() if part in name), None)
    if private is not None:
        result.private[private[1] or private[2]] += 1
    elif reason is not None:
        result.on_purpose[reason] += 1
    else:
        result.other[name] = (failed.get("message") or "").partition("\n")[0]


def main() -> int:
    HOME.mkdir(exist_ok=True)
    unexplained = 0
    print("| suite | passed | skipped | reads private names | differs on purpose | other |")
    print("|---|---|---|---|---|---|")
    with clean_emulator() as emulator:
        mount = {**emulator.environment(), "THREEFS_MOUNT_POINT": str(emulator.mount)}
        for suite in SUITES:
            for stem, result in run(suite, fetch(suite), mount).items():
                private = "; ".join(f"{number} `{name}`" for name, number in result.private.items()) or "0"
                purpose = "; ".join(f"{number}: {why}" for why, number in result.on_purpose.items()) or "0"
                label = f"{suite.distribution} {suite.version}, {stem}"
                print(f"| {label} | {result.passed} | {result.skipped} | {private} | {purpose} | {len(result.other)} |")
                for name, message in result.other.items():
                    print(f"{name}: {message}", file=sys.stderr)
                unexplained += len(result.other)
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
