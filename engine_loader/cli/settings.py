"""``engine-loader settings``: every setting, its value, and where the value came from."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from .console.output import console, print_json, printable


def settings(
    *,
    changed: Annotated[bool, typer.Option("--changed", help="Only settings that do not have their default.")] = False,
    env: Annotated[
        bool, typer.Option("--env", help="Name each setting by its variable, as a file of variables has them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every setting: its value, default, origin and meaning.

    A value comes from the default, the YAML file that ENGINE_LOADER_CONFIG names, an environment variable, or
    --model-loader-extra-config of the engine; the last one counts. With an unknown setting or a bad value, the status
    is 2.

    **Examples**

    ```shell
    engine-loader settings
    ENGINE_LOADER_CONFIG=engine-loader.yaml engine-loader settings
    ENGINE_LOADER_LOADER__THREADS=8 engine-loader settings --json
    engine-loader settings --changed --env > engine-loader.env
    ```
    """
    rows = [row for row in _rows() if not changed or row["shown"] != row["default"]]
    if as_json:
        print_json(rows)
        return
    from rich.padding import Padding
    from rich.text import Text

    out = console()
    if env:
        for row in rows:
            if not changed:
                out.print(Text(f"# {row['description']}", "dim"), soft_wrap=True)
            out.print(f"{row['variable']}={shlex.quote(row['shown'])}", soft_wrap=True)
        return
    if not rows:
        out.print("all settings have their defaults")
    for row in rows:
        line = Text.assemble((row["name"], "bold"), f" = {printable(row['shown'])}")
        if row["origin"] != "default":
            line.append(f"  ← {printable(row['origin'])} (default: {row['default']})", "cyan")
        out.print(line, soft_wrap=True)
        out.print(Padding(Text(row["description"], "dim"), (0, 0, 0, 4), expand=False))


def _rows() -> list[dict[str, Any]]:
    from ..settings import describe_settings, load_settings, setting_value, show_value, variable_name

    resolved = load_settings()
    return [
        {
            "name": name,
            "value": setting_value(resolved.settings, name),
            "shown": show_value(setting_value(resolved.settings, name)),
            "default": default,
            "origin": resolved.origins.get(name, "default"),
            "variable": variable_name(name),
            "description": description,
        }
        for name, default, description in describe_settings()
    ]
