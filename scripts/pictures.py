"""Draws the pictures of README and docs: python -m scripts.pictures

The bars are the medians in the tables of docs/performance.md; a test draws them again and compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
FONT = "font-family='system-ui, Segoe UI, Helvetica, Arial, sans-serif'"
OURS = "engine_loader load_into"
SHOWN = {
    OURS: "engine_loader",
    "safetensors": "safetensors",
    "fastsafetensors": "fastsafetensors",
    "Run:ai Model Streamer": "Run:ai Model Streamer",
}
"""Rows of the tables -> what the picture calls them."""
PANELS = {
    "### Warm page cache, into touched parameters": "page cache, a reload",
    "### Warm page cache, into fresh parameters": "page cache, a start",
    "### Cold page cache, into touched parameters": "from the disk",
}
PLAIN_READS = "the fastest plain reads"


def medians(document: str, heading: str) -> dict[str, float]:
    """The medians of the first table below a heading of docs/performance.md: row -> GB/s."""
    below = document.split(f"\n{heading}\n", 1)[1].split("\n#", 1)[0].split("\n\n")
    table = next(part for part in map(str.strip, below) if part.startswith("| reads with"))
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \|.*$", table, re.MULTILINE)
    found = {name: float(value) for name, value in rows}
    found[PLAIN_READS] = max(value for name, value in found.items() if name.startswith(("preadv", "dd ")))
    return found


def measured(document: str) -> str:
    """Three panels of bars, one scale each, ours first."""
    width, row, label = 540, 26, 160
    parts, y = [], 34
    for heading, title in PANELS.items():
        values = medians(document, heading)
        bars = [(shown, values[name]) for name, shown in SHOWN.items()] + [(PLAIN_READS, values[PLAIN_READS])]
        scale = (width - label - 84) / max(value for _, value in bars)
        parts.append(f"<text x='12' y='{y}' class='t' font-weight='600'>{escape(title)}</text>")
        y += 12
        for name, value in bars:
            kind = "o" if name == SHOWN[OURS] else "l" if name == PLAIN_READS else "r"
            middle = y + row / 2 + 4
            parts += [
                f"<text x='{label - 8}' y='{middle}' class='t' text-anchor='end'>{escape(name)}</text>",
                f"<rect x='{label}' y='{y + 4}' width='{value * scale:.1f}' height='{row - 8}' rx='2' class='{kind}'/>",
                f"<text x='{label + value * scale + 6:.1f}' y='{middle}' class='t'>{value:.2f} GB/s</text>",
            ]
            y += row
        y += 30
    note = "2.98 GiB in 6 files into CPU memory, 2 CPUs; medians of docs/performance.md"
    parts.append(f"<text x='12' y='{y - 8}' class='n'>{note}</text>")
    return picture(width, y + 4, parts)


def staircase() -> str:
    """The rooms of the code as steps: data flows up to the engine, imports go down."""
    steps = [
        ("engines", "vLLM, SGLang: thin adapters"),
        ("loading", "find, record, plan, stream"),
        ("transfer", "reader threads, buffers, devices"),
        ("sources", "files, 3FS, object stores, memory"),
        ("formats", "what the bytes mean"),
    ]
    width, height, step = 560, 330, 56
    parts = []
    for index, (name, what) in enumerate(steps):
        x, y = 12 + index * 40, 20 + index * step
        parts += [
            f"<rect x='{x}' y='{y}' width='270' height='{step - 8}' rx='5' class='{'o' if index == 0 else 's'}'/>",
            f"<text x='{x + 14}' y='{y + 20}' class='{'w' if index == 0 else 't'}' font-weight='600'>{name}</text>",
            f"<text x='{x + 14}' y='{y + 38}' class='{'w' if index == 0 else 't'}'>{escape(what)}</text>",
        ]
    parts += [
        "<rect x='340' y='20' width='208' height='104' rx='5' class='c'/>",
        "<text x='354' y='40' class='t' font-weight='600'>compile cache</text>",
        "<text x='354' y='60' class='t'>restore before warm-up,</text>",
        "<text x='354' y='78' class='t'>save after it; in processes</text>",
        "<text x='354' y='96' class='t'>of their own</text>",
        f"<text x='12' y='{height - 6}' class='n'>bytes rise from step to step; imports only go down</text>",
    ]
    return picture(width, height, parts)


def picture(width: int, height: float, parts: list[str]) -> str:
    """An SVG that follows the reader's light or dark scheme, no wider than a phone can show in legible letters.

    Text has a contrast of at least 4.5 to what it stands on, bars and frames of at least 3.
    """
    style = (
        ".t{fill:#1f2430;font-size:13px}.n{fill:#5c6370;font-size:12px}.w{fill:#fff;font-size:13px}"
        ".o{fill:#3949ab}.r{fill:#7986cb}.l{fill:#8f949f}.s{fill:#e3e6f5}.c{fill:none;stroke:#3949ab;stroke-width:1.5}"
        ".b{fill:#fff}"
        "@media(prefers-color-scheme:dark){.t{fill:#e6e8ee}.n{fill:#a5abb8}.w{fill:#10131c}.o{fill:#9fa8da}"
        ".r{fill:#5f6bab}.l{fill:#6b7080}.s{fill:#2b3048}.c{stroke:#7986cb}.b{fill:#1e2129}}"
    )
    size = f"width='{width}' height='{height:.0f}'"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' {size} viewBox='0 0 {width} {height:.0f}' {FONT}>"
        f"<style>{style}</style><rect {size} rx='6' class='b'/>" + "".join(parts) + "</svg>\n"
    )


def pictures() -> Iterator[tuple[Path, str]]:
    document = (ROOT / "docs" / "performance.md").read_text()
    yield IMAGES / "measured.svg", measured(document)
    yield IMAGES / "staircase.svg", staircase()


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for path, content in pictures():
        path.write_text(content)
