"""``engine-loader doctor``: checks versions, settings, engines, file systems and the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console.output import console, print_json, print_wrapped, printable

if TYPE_CHECKING:
    from .diagnosis.finding import Finding

_MARKS = {"ok": ("✓", "green"), "absent": ("-", "dim"), "warn": ("!", "yellow"), "fail": ("✗", "bold red")}


def doctor(
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="[PATH]...", help="Models whose files and file systems are checked.")
    ] = None,
    *,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Skip checks that take seconds: engines' plugins, reading back a tensor, GPUs."),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="The exit status is 1 if there is a !, too; for init containers.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show details: where was searched, what each fix-up changes and why.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle",
            metavar="FILE",
            help="Also write a .tar.gz for a report of a problem: findings, settings, versions, the last starts.",
        ),
    ] = None,
) -> None:
    """Check versions, engines, plugins, sources, cache directories and the machine, and say how to repair each problem.

    ✓: no problem; -: absent, and not needed; !: may be slow or fail; ✗: will not work. The exit status is 1 if there is
    a ✗.

    **Examples**

    ```shell
    engine-loader doctor
    engine-loader doctor --quick /mnt/3fs/models/llama
    engine-loader doctor --json | jq '.findings[] | select(.status != "ok")'
    engine-loader doctor --bundle bundle.tar.gz
    ```
    """
    findings = []
    shown_area = ""
    for finding in _findings(paths or [], quick=quick, quiet=as_json):
        findings.append(finding)
        if not as_json:
            if finding.area != shown_area:
                console().print(("\n" if shown_area else "") + finding.area, style="bold")
                shown_area = finding.area
            _print(finding, verbose=verbose)
    counts = Counter[str](finding.status for finding in findings)
    if as_json:
        summary = {status: counts[status] for status in _MARKS}
        print_json({"findings": [asdict(finding) for finding in findings], "summary": summary})
    else:
        console().print(f"\n{counts['ok']} ok, {counts['warn']} to check, {counts['fail']} to repair")
    if bundle is not None:
        from .diagnosis.bundle import write_bundle

        names = write_bundle(bundle, [asdict(finding) for finding in findings])
        if not as_json:
            console().print(f"{bundle}: {len(names)} files, without secrets; look at it before you send it")
    if counts["fail"] or (strict and counts["warn"]):
        raise typer.Exit(1)


def _findings(paths: list[str], *, quick: bool, quiet: bool) -> Iterator[Finding]:
    from .diagnosis import cache_directories, cache_sharing, engine_plugins, file_systems, gpus, resources, software

    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", software.check_versions),
        ("compiled modules", software.check_bytecode),
        ("settings", software.check_settings),
        ("the native library", software.check_native_library),
        ("engines; this takes some seconds", lambda: engine_plugins.check_engines(start=not quick)),
        *([] if quick else [("GPUs", gpus.check_gpus)]),
        *([] if quick else [("sources", software.check_reading)]),
        ("3FS", file_systems.check_3fs),
        ("file systems", lambda: file_systems.check_paths(paths)),
        ("cache directories", cache_directories.check_caches),
        ("the compile cache", cache_sharing.check_compile_cache),
        ("the machine", resources.check_machine),
    ]
    err = console(stderr=True)
    for what, check in checks:
        with nullcontext() if quiet or not err.is_terminal else err.status(f"checking {what}"):
            yield from _checked(what, check)


def _checked(what: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    from ..errors import SettingsError
    from .diagnosis.finding import Finding

    try:
        return list(check())
    except SettingsError:
        # The check of the settings reports what is wrong with the settings.
        return [Finding("software", what, "warn", "not checked: the settings cannot be read", "repair the settings")]


def _print(finding: Finding, *, verbose: bool) -> None:
    mark, style = _MARKS[finding.status]
    name = printable(finding.name)
    print_wrapped(f"  {mark} {name}: {printable(finding.value)}", indent="    ", parts={mark: style, name: "bold"})
    if verbose and finding.detail:
        print_wrapped(f"      {printable(finding.detail)}", "dim", indent="      ")
    if finding.repair:
        print_wrapped(f"    → {printable(finding.repair)}", style if mark in "!✗" else "dim", indent="      ")
