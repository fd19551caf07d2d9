"""``engine-loader emulate-3fs``: try the 3FS path without a 3FS cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console.output import console

_USE = """\
Built {library}

It takes the directory {mount} for a 3FS mount: put checkpoints there, and read them with

  export HF3FS_LIB_DIR={lib_dir}
  export HF3FS_EMULATOR_MOUNT={mount}
  engine-loader bench read {mount}/MODEL
  vllm serve {mount}/MODEL --load-format b10_3fs

The log line of the load then says "from usrbio". How the storage behaves is set by

  export HF3FS_EMULATOR_OPTIONS=bandwidth=2000000000,latency_us=2000

Options: bandwidth (bytes/s of the link), latency_us and jitter_us of each IO, and faults: error_every=N (with
error=ERRNO), short_every, zero_every, hang_every, late_every (with late_ms), full_every, buffer_every, hole_at with
hole_bytes, die_after, dead. They can also stand in the file that HF3FS_EMULATOR_CONTROL names, which is read again
whenever it changes.
"""


def emulate_3fs(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What to take for a 3FS mount; made if it is missing.")
    ],
) -> None:
    """Build an emulator of 3FS's user-space library, and say how to use it.

    DIR then works as a 3FS mount for whatever reads by USRBIO; the library is put into DIR/.3fs-emulator. It needs a C
    compiler.

    **Example**

    ```shell
    engine-loader emulate-3fs /tmp/3fs
    ```
    """
    from ..threefs_emulator import build_emulator

    mount = directory.absolute()
    library = build_emulator(mount / ".3fs-emulator")
    console().print(_USE.format(library=library, mount=mount, lib_dir=library.parent), soft_wrap=True)
