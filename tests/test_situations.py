"""docs/situations.md names tests that exist, and messages that they look for."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.messages import texts_of_the_package

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(
    r"\| (?P<what>.+?) \| (?P<happens>.+?) \| (?:`(?P<message>.+?)`)? ?\| \[`(?P<test>\w+)`\]\((?P<file>\S+)\) \|"
)


def rows() -> list[dict[str, str]]:
    lines = (ROOT / "docs" / "situations.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("| ") and not line.startswith("| situation ")]
    found = [ROW.fullmatch(line) for line in table]
    assert None not in found, [line for line, row in zip(table, found, strict=True) if row is None]
    return [row.groupdict() for row in found if row is not None]


@cache
def texts_of(file: Path) -> str:
    """All texts in a file of tests, patterns without their backslashes."""
    nodes = ast.walk(ast.parse(file.read_text()))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\0".join(texts).replace("\\", "")


@cache
def functions_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_there_are_forty() -> None:
    assert len(rows()) >= 40


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["what"][:40])
def test_its_test_and_its_words_exist(row: dict[str, str]) -> None:
    file = ROOT / "docs" / row["file"]
    assert row["test"] in functions_in(file)
    if row["message"] is not None:
        assert row["message"] in texts_of_the_package()
        assert row["message"] in texts_of(file), "its test does not look for these words"
