"""The pictures show the figures of docs/performance.md."""

import pytest

from scripts.pictures import ROOT, pictures


@pytest.mark.parametrize(("path", "content"), list(pictures()), ids=lambda value: getattr(value, "name", ""))
def test_a_picture_is_as_it_would_be_drawn_now(path: object, content: str) -> None:
    assert path.read_text() == content, "run python -m scripts.pictures"  # type: ignore[attr-defined]


def test_the_readme_shows_the_measured_one() -> None:
    assert "](docs/images/measured.svg)" in (ROOT / "README.md").read_text()
