"""Pictures of a start's report for the docs: the page on a desktop, on a phone and in the dark, and the terminal.

    python -m scripts.screenshots START_DIRECTORY docs/images

Needs Chromium; nothing is loaded from a network.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

PICTURES = {
    "report-desktop": ("1200,900", ()),
    "report-phone": ("500,1000", ()),  # Chromium's windows are no narrower
    "report-dark": ("1200,900", ("--blink-settings=preferredColorScheme=0",)),
}
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("start", type=Path, help="the directory of a start")
    parser.add_argument("pictures", type=Path, help="where the pictures go")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        sys.exit("Chromium is needed, and is not installed (package chromium)")
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        page, terminal = Path(directory, "start.html"), Path(directory, "terminal.html")
        report(arguments.start, "--html", str(page))
        text = report(arguments.start)
        terminal.write_text(
            '<meta charset="utf-8"><body style="margin:0;background:#0d1117"><pre style="margin:1rem;color:#e6edf3;'
            f'font:13px/1.35 monospace">{escape(text)}</pre>'
        )
        for name, (size, options) in PICTURES.items():
            shoot(browser, page, arguments.pictures / f"{name}.png", size, *options)
        lines = text.splitlines()
        size = f"{max(map(len, lines)) * 8 + 48},{len(lines) * 18 + 48}"
        shoot(browser, terminal, arguments.pictures / "report-terminal.png", size)


def report(start: Path, *options: str) -> str:
    """What `engine-loader report` prints."""
    command = [sys.executable, "-m", "engine_loader", "report", str(start), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
    return done.stdout


def shoot(browser: str, page: Path, picture: Path, size: str, *options: str) -> None:
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--no-first-run",
            f"--user-data-dir={profile}",
            f"--window-size={size}",
            f"--screenshot={picture}",
            *options,
            page.as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    print(picture)


if __name__ == "__main__":
    main()
