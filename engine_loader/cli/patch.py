"""``engine-loader patch``: patches installed engines that cannot load plugins, or that have a known fault."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import EngineLoaderError
from .console.output import console, print_json, printable

if TYPE_CHECKING:
    from ..patching import Patch

app = typer.Typer(
    no_args_is_help=True, help="Patch installed engines that cannot load plugins, or that have a known fault."
)
Name = Annotated[str, typer.Argument(metavar="NAME", help="A name that `engine-loader patch list` shows.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the files that would change, and change nothing.")]
_FITS = ("can be applied", "applied", "differs")


@app.command("list")
def list_patches(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the patches: purpose, versions, and whether each is applied to the installed engine."""
    from ..patching import all_patches

    if as_json:
        print_json(
            [
                {
                    "name": patch.name,
                    "title": patch.title,
                    "distribution": patch.distribution,
                    "versions": str(patch.versions),
                    "installed": patch.installed,
                    "state": patch.state(),
                }
                for patch in all_patches()
            ]
        )
        return
    out = console()
    for patch in all_patches():
        out.print(f"{patch.name}: {patch.title}", soft_wrap=True)
        installed = "" if patch.installed is None else f", {patch.installed} is installed"
        out.print(f"    {patch.distribution} {patch.versions}{installed}: {patch.state()}", soft_wrap=True)


@app.command()
def check(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]…", help="Default: all for the installed versions.")
    ] = None,
) -> None:
    """Print whether each patch for the installed versions is applied. Exit status 1: a file has unexpected content."""
    from ..patching import patch_named

    patches = [patch_named(name) for name in names] if names else _fitting()
    out = console()
    for patch in patches:
        out.print(f"{patch.name}: {patch.state()}", soft_wrap=True)
    if not patches:
        out.print("there is no patch for the installed versions")
    if any(patch.state() == "differs" for patch in patches):
        raise typer.Exit(1)


@app.command()
def apply(name: Name, dry_run: DryRun = False) -> None:
    """Apply a patch to the installed engine.

    Nothing is written unless all lines that the patch replaces are as expected. Before a file is changed, it is copied
    to a backup beside it. Installing the engine again also removes the patch.

    **Example**

    ```shell
    engine-loader patch list
    engine-loader patch apply --dry-run sglang-0.5.10-plugin
    engine-loader patch apply sglang-0.5.10-plugin
    ```
    """
    from ..patching import BACKUP_SUFFIX, patch_named

    patch = patch_named(name)
    with _writing(patch):
        changed = patch.apply(dry_run=dry_run)
    _print_paths("would change" if dry_run else "changed", changed)
    if not changed:
        console().print(f"{patch.name} is applied already")
    elif not dry_run:
        console().print(f"the backups are beside the files, with {BACKUP_SUFFIX} at the end", soft_wrap=True)


@app.command()
def revert(name: Name, dry_run: DryRun = False) -> None:
    """Remove a patch from the installed engine, and the backups of its files."""
    from ..patching import patch_named

    patch = patch_named(name)
    with _writing(patch):
        changed = patch.revert(dry_run=dry_run)
    _print_paths("would restore" if dry_run else "restored", changed)
    if not changed:
        console().print(f"{patch.name} is not applied")


def _print_paths(done: str, paths: Iterable[Path]) -> None:
    for path in paths:
        console().print(f"{done} {printable(str(path))}", soft_wrap=True)


def _fitting() -> list[Patch]:
    from ..patching import all_patches

    return [patch for patch in all_patches() if patch.state() in _FITS]


@contextmanager
def _writing(patch: Patch) -> Iterator[None]:
    """Turn an OSError into one message."""
    try:
        yield
    except OSError as error:
        raise EngineLoaderError(f"{error}: run this command as the user who installed {patch.distribution}") from error
