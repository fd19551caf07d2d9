"""The command ``engine-loader``. One file per command; slow imports happen when a command runs."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import EngineLoaderError, SettingsError
from . import (
    bench,
    compile_cache,
    convert,
    doctor,
    emulate_3fs,
    explain_load,
    inspect,
    patch,
    reshard,
    settings,
)
from .console.output import print_error
from .starts import report, warm

_BAD_SETTINGS_STATUS = 2


class _Commands(TyperGroup):
    """Turns errors of this package, and those of the system, into one message and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except EngineLoaderError as error:
            print_error(str(error))
            # The status of bad settings is that of bad options of the command line.
            raise typer.Exit(_BAD_SETTINGS_STATUS if isinstance(error, SettingsError) else 1) from None
        except BrokenPipeError:  # the reader of the output has ended
            raise
        except OSError as error:  # a disk that is full or read-only, a limit, a directory that is missing
            if error.errno is None or error.strerror is None:
                raise
            name = errno.errorcode.get(error.errno, str(error.errno))
            where = f"{error.filename}: " if error.filename is not None else ""
            print_error(f"{where}{error.strerror} [{name}]")
            raise typer.Exit(1) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"engine-loader {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Inspect checkpoints, settings and machines, and measure how fast weights are read.

    Start here:

    ```shell
    engine-loader doctor                 # check this machine and its software
    engine-loader inspect --check MODEL  # check a checkpoint
    engine-loader bench read MODEL       # measure how fast it loads on this machine
    engine-loader report                 # where the time of the last start went
    engine-loader settings               # each setting, and where it was set
    ```
    """


app.command()(inspect.inspect)
app.command("explain-load")(explain_load.explain_load)
app.command()(convert.convert)
app.command()(reshard.reshard)
app.command()(settings.settings)
app.command()(doctor.doctor)
app.command()(warm.warm)
app.command("emulate-3fs")(emulate_3fs.emulate_3fs)
app.add_typer(bench.app, name="bench")
app.add_typer(report.app, name="report")
app.add_typer(patch.app, name="patch")
app.add_typer(compile_cache.app, name="compile-cache")
