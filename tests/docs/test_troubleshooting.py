"""docs/troubleshooting.md quotes messages that exist, and settings that exist are named in the new pages."""

import re
from pathlib import Path

import pytest

from engine_loader.settings import describe_settings

from .messages import PACKAGE, texts_of_the_package

DOCS = Path(__file__).resolve().parents[2] / "docs"
# Of engines, and of lines that are put together.
ELSEWHERE = {"Load format b10_3fs is not supported", "invalid choice: 'b10_3fs'", "buffered", "compile cache: miss;"}
SETTING = re.compile(r"`((?:loader|compile_cache)\.\w+)`")


def quoted() -> list[str]:
    rows = re.findall(r"^\| `([^`]+)`", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    return [row for row in rows if row not in ELSEWHERE]


def test_there_are_twenty() -> None:
    assert len(quoted()) >= 20


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_exists(message: str) -> None:
    native = "\0".join(path.read_text() for path in PACKAGE.rglob("*.cpp"))
    assert message in texts_of_the_package() or message in native


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_a_setting_that_a_page_names_exists(page: str) -> None:
    known = {name for name, _, _ in describe_settings()}
    named = set(SETTING.findall((DOCS / page).read_text()))
    assert named <= known
