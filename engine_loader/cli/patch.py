"""``engine-loader patch``: changes of installed engines that have no place for plugins, or a fault."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from ..errors import EngineLoaderError
from ..patching import BACKUP_SUFFIX, Patch, all_patches, patch_named
from .console.output import console, printable

app = typer.Typer(no_args_is_help=True, help="Patch installed engines that have no place for plugins, or a fault.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="As `engine-loader patch list` shows it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be changed, and change nothing.")]
_FITS = ("can be applied", "applied", "differs")


@app.command("list")
def list_patches() -> None:
    """Show every patch, what it is for, and how what is installed here stands to it."""
    out = console()
    for patch in all_patches():
        out.print(f"{patch.name}: {patch.title}", soft_wrap=True)
        installed = "" if patch.installed is None else f", {patch.installed} is installed"
        out.print(f"    {patch.distribution} {patch.versions}{installed}: {patch.state()}", soft_wrap=True)


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]…", help="Default: all that fit.")] = None,
) -> None:
    """Say of each patch that fits the installed versions whether it is applied. Status 1: a file is not as expected."""
    patches = [patch_named(name) for name in names] if names else _fitting()
    out = console()
    for patch in patches:
        out.print(f"{patch.name}: {patch.state()}", soft_wrap=True)
    if not patches:
        out.print("no patch is for what is installed here")
    if any(patch.state() == "differs" for patch in patches):
        raise typer.Exit(1)


@app.command()
def apply(name: Name, dry_run: DryRun = False) -> None:
    """Apply a patch to what is installed here.

    Nothing is written unless every line is as expected; each file is copied beside itself first. Installing the engine
    again undoes it.

    **Example**

    ```shell
    engine-loader patch list
    engine-loader patch apply --dry-run sglang-0.5.10-plugin
    engine-loader patch apply sglang-0.5.10-plugin
    ```
    """
    patch = patch_named(name)
    with _writing(patch):
        changed = patch.apply(dry_run=dry_run)
    for path in changed:
        console().print(f"{'would change' if dry_run else 'changed'} {printable(str(path))}", soft_wrap=True)
    if not changed:
        console().print(f"{patch.name} is applied already")
    elif not dry_run:
        console().print(f"the files as they were are beside them, with {BACKUP_SUFFIX} at the end", soft_wrap=True)


@app.command()
def revert(name: Name, dry_run: DryRun = False) -> None:
    """Take a patch back."""
    patch = patch_named(name)
    with _writing(patch):
        changed = patch.revert(dry_run=dry_run)
    for path in changed:
        console().print(f"{'would restore' if dry_run else 'restored'} {printable(str(path))}", soft_wrap=True)
    if not changed:
        console().print(f"{patch.name} is not applied")


def _fitting() -> list[Patch]:
    return [patch for patch in all_patches() if patch.state() in _FITS]


@contextmanager
def _writing(patch: Patch) -> Iterator[None]:
    """Turn a file that cannot be written into one message."""
    try:
        yield
    except OSError as error:
        raise EngineLoaderError(
            f"{error}: can you write where {patch.distribution} is installed? Run this as whoever installed it"
        ) from error
