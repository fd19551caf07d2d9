"""The documentation site builds without a warning (make docs), and has what the project has."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from engine_loader.cli import app

from .commands import commands

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return out


@pytest.mark.slow
def test_every_command_is_in_the_reference(site: Path) -> None:
    page = (site / "cli.html").read_text()
    command = typer.main.get_command(app)
    for name, one in command.commands.items():  # type: ignore[attr-defined]
        assert f'id="engine-loader-{name}"' in page
        for below in getattr(one, "commands", {}):
            assert f'id="engine-loader-{name}-{below}"' in page


@pytest.mark.slow
def test_what_is_public_is_in_the_reference(site: Path) -> None:
    import engine_loader
    import engine_loader.dcp

    page = (site / "api.html").read_text()
    for name in (*engine_loader.__all__, *engine_loader.dcp.__all__, "convert_checkpoint"):
        assert re.search(rf'id="[\w.]*\.{name}"', page) or name in (
            "FileSystem",
            "FileSystemBase",
            "SerializationFormat",
        ), name


@pytest.mark.slow
def test_commands_are_on_the_site_as_they_are_in_the_documents(site: Path) -> None:
    pages: dict[str, str] = {}
    for command in commands():
        name = command.document.removeprefix("docs/").removesuffix(".md")
        if command.document.startswith("README"):
            continue
        if name not in pages:
            shown = re.findall(r"<code>(.*?)</code>", (site / f"{name}.html").read_text(), re.DOTALL)
            text = "\n".join(html.unescape(re.sub("<[^>]+>", "", code)) for code in shown)
            pages[name] = " ".join(text.split())
        for word in command.words:
            assert word in pages[name].replace("'", "").replace('"', "") or word in pages[name] or "\n" in word, command


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        fetched = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="?(https?://[^"\s>]+)', page.read_text())
        assert [url for url in fetched if "rel=canonical" not in url] == []


def test_every_page_has_a_place_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert pages <= set(re.findall(r"(\S+\.md)", text))
    assert yaml.safe_load(text)["strict"] is True


@pytest.mark.slow
def test_colours_are_those_of_the_system_until_somebody_chooses(site: Path) -> None:
    page = (site / "index.html").read_text()
    first, *others = re.findall(r'data-md-color-media="([^"]*)"[^>]*name="?__palette', page)
    assert first == "(prefers-color-scheme)"
    assert others == ["(prefers-color-scheme: light)", "(prefers-color-scheme: dark)"]


@pytest.mark.slow
def test_a_picture_on_a_light_ground_has_one_for_the_dark(site: Path) -> None:
    page = (site / "report.html").read_text()
    shown = re.findall(r'<img[^>]*src="?(images/[^" >]+)', page)
    assert shown == ["images/report-desktop.png#only-light", "images/report-dark.png#only-dark"]
    assert all((site / path.partition("#")[0]).is_file() for path in shown)
