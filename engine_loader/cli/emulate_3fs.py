"""``engine-loader emulate-3fs``: builds an emulator of 3FS, for tests of reading by USRBIO without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console.output import console

_USE = """\
Built {library}

It treats the directory {mount} as a 3FS mount: put checkpoints there, and read them with

  export HF3FS_LIB_DIR={lib_dir}
  export HF3FS_EMULATOR_MOUNT={mount}
  engine-loader bench read {mount}/MODEL
  vllm serve {mount}/MODEL --load-format b10_3fs

The log line of the load then says "from usrbio". Speed and faults of the storage are set by

  export HF3FS_EMULATOR_OPTIONS=bandwidth=2000000000,latency_us=2000

Options: bandwidth (bytes/s of the link), latency_us and jitter_us of each IO, and faults: error_every=N (with
error=ERRNO), short_every, zero_every, hang_every, late_every (with late_ms), full_every, buffer_every, hole_at with
hole_bytes, die_after, dead. Options can also be in the file that HF3FS_EMULATOR_CONTROL names; the emulator reads the
file again when it changes.
"""


def emulate_3fs(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The directory to treat as a 3FS mount; made if it is missing.")
    ],
) -> None:
    """Build an emulator of 3FS's user-space library, and print how to use it.

    With the library, programs that read by USRBIO treat DIR as a 3FS mount. The library is written to
    DIR/.3fs-emulator. This needs a C compiler.

    **Example**

    ```shell
    engine-loader emulate-3fs /tmp/3fs
    ```
    """
    from ..threefs_emulator import build_emulator

    mount = directory.absolute()
    library = build_emulator(mount / ".3fs-emulator")
    console().print(_USE.format(library=library, mount=mount, lib_dir=library.parent), soft_wrap=True)
