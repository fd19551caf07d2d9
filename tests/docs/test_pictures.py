"""The pictures show the figures of docs/performance.md."""

import re

import pytest

from scripts.pictures import ROOT, pictures


@pytest.mark.parametrize(("path", "content"), list(pictures()), ids=lambda value: getattr(value, "name", ""))
def test_a_picture_is_as_it_would_be_drawn_now(path: object, content: str) -> None:
    assert path.read_text() == content, "run python -m scripts.pictures"  # type: ignore[attr-defined]


def test_the_readme_shows_the_measured_one() -> None:
    assert "](docs/images/measured.svg)" in (ROOT / "README.md").read_text()


def luminance(colour: str) -> float:
    """Of #rgb or #rrggbb, 0 to 1, as WCAG defines it."""
    digits = "".join(digit * 2 for digit in colour) if len(colour) == 3 else colour
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_bars_stand_out_in_both_schemes(scheme: str) -> None:
    for _, content in pictures():
        light, dark = content.partition("</style>")[0].split("@media(prefers-color-scheme:dark)")
        rules = light + (dark if scheme == "dark" else "")
        colours = dict(re.findall(r"\.(\w){(?:fill:none;)?(?:fill|stroke):#([0-9a-f]+)", rules))
        for text, ground in ("tb", "ts", "nb", "wo"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for bar in "orlc":
            assert contrast(colours[bar], colours["b"]) >= 3, bar
