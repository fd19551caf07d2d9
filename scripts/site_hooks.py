"""What the documentation site has beside docs/: the files that its pages link to, and the reference of the commands.

mkdocs calls the functions here by their names (``hooks`` in mkdocs.yml).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")
"""Documents of the repository that are pages of the site."""
IN_THE_DARK = {"images/report-desktop.png": "images/report-dark.png"}
"""Pictures on a light ground -> what the site shows in dark colours; SVGs follow the scheme by themselves."""
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)#\s]+)\)")
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
WITHOUT_LINK = "\x00"
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and files that lie outside docs/."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    files.append(File.generated(config, "cli.md", content=command_line_reference()))
    sources = [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in PAGES)]
    for path in sorted({found for source in sources for found in linked_files(source)}):
        files.append(File.generated(config, f"files/{path}.txt", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of the repository become links of the site; what the site does not have is named without a link."""
    in_site = page.file.src_uri
    source = ROOT / in_site if in_site in PAGES else ROOT / "docs" / in_site
    there = os.path.dirname(in_site)

    def exchange(match: re.Match[str]) -> str:
        path = in_repository(source, match[1])
        if path is None:
            return match[0]
        if path in PAGES:
            target = path
        elif path.startswith("docs/"):
            target = path.removeprefix("docs/")
        elif (ROOT / path).is_file() and not path.endswith(".md"):
            target = f"files/{path}.txt"
        else:
            return f"]{WITHOUT_LINK}"
        return f"]({os.path.relpath(target, there or '.')}{match[2] or ''})"

    def by_scheme(match: re.Match[str]) -> str:
        dark = IN_THE_DARK.get(match[2])
        return f"![{match[1]}]({match[2]}#only-light)![{match[1]}]({dark}#only-dark)" if dark else match[0]

    markdown = PICTURE.sub(by_scheme, markdown)
    # Of a link whose target is gone the text stays. Other brackets are somebody's: `pip install 'engine-loader[s3]'`.
    text = re.sub(rf"\[([^\[\]]+)\]{WITHOUT_LINK}", r"\1", outside_fences(markdown, exchange))
    return text.replace(WITHOUT_LINK, "")


def outside_fences(markdown: str, exchange: Any) -> str:
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(exchange, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(exchange, markdown[end:])])


def in_repository(source: Path, target: str) -> str | None:
    """The path in the repository that a relative link of a document leads to; None where there is nothing."""
    path = Path(os.path.normpath(source.parent / target))
    if not path.is_relative_to(ROOT) or not path.exists():
        return None
    return path.relative_to(ROOT).as_posix()


def linked_files(source: Path) -> Iterator[str]:
    """Files of the repository outside docs/ that a document links to, documents excepted."""
    for match in LINK.finditer(source.read_text()):
        path = in_repository(source, match[1])
        if path and not path.startswith("docs/") and not path.endswith(".md") and (ROOT / path).is_file():
            yield path


def command_line_reference() -> str:
    """A page with every command, its arguments and options, as the commands themselves tell them."""
    from engine_loader.cli import app

    command = typer.main.get_command(app)
    return "\n".join(["# Command line", "", *describe_command(command, "engine-loader", None, 2)]) + "\n"


def describe_command(command: Any, name: str, parent: Any, level: int) -> Iterator[str]:
    context = type(command).context_class(command, info_name=name.rsplit(maxsplit=1)[-1], parent=parent)
    if parent is not None:
        yield f"{'#' * min(level, 4)} {name}\n"
    yield (command.help or "").replace("\b\n", "").replace("```shell", "```sh").replace("\f", "") + "\n"
    if not hasattr(command, "commands"):
        yield f"`{context.command_path} {' '.join(command.collect_usage_pieces(context))}`\n"
    rows = [row for row in map(describe_parameter, command.params) if row]
    if rows:
        yield from ["| argument or option | what it is |", "|---|---|", *rows, ""]
    for below, one in getattr(command, "commands", {}).items():
        if not one.hidden:
            yield from describe_command(one, f"{name} {below}", context, level + (parent is not None))


def describe_parameter(parameter: Any) -> str:
    if parameter.name == "help" or getattr(parameter, "hidden", False):
        return ""
    if parameter.param_type_name == "option":
        shown = ", ".join(f"`{one}`" for one in [*parameter.opts, *parameter.secondary_opts])
    else:
        shown = f"`{(parameter.metavar or parameter.name).upper()}`"
    default = parameter.default
    has_default = (
        default is not None and not callable(default) and default not in (False, (), []) and "<" not in repr(default)
    )
    text = " ".join((getattr(parameter, "help", None) or "").split())
    if has_default:
        text += f" Default: `{getattr(default, 'value', default)}`."
    return f"| {shown} | {text.replace('|', chr(92) + '|')} |"
