"""A linter's new release must not change what `make lint` says: versions are exact, and the same everywhere."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LINTERS = ("mypy", "ruff")
STUBS = ("types-PyYAML", "types-tqdm")


def pinned(requirements: list[str]) -> dict[str, str]:
    """Exact versions by name."""
    found = (re.fullmatch(r"([\w-]+)==([\w.]+)", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in found if match}


def of_the_project() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return pinned(project["optional-dependencies"]["test"])


@pytest.mark.parametrize("name", [*LINTERS, *STUBS])
def test_the_project_names_the_version_that_is_installed(name: str) -> None:
    assert of_the_project()[name] == version(name)


def test_commits_are_checked_by_the_same_versions() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    used = [pinned(hook["additional_dependencies"]) for hook in hooks]
    wanted = of_the_project()
    assert {name for versions in used for name in versions} == set(LINTERS)
    assert all(versions == {name: wanted[name]} for versions in used for name in versions)
