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

Options: bandwidth (bytes/s of the link; with shared_link=1 of all processes), latency_us and jitter_us of each IO.

Limits of the daemon: limits=1 sets those that 3FS ships: batches=112, requests=32, server_requests=8, servers=16,
request_bytes=4194304, chunk_bytes=1048576. IOs are then cut into requests, and each request has the latency.

Faults: error_every=N (with error=ERRNO), short_every, zero_every, hang_every, late_every (with late_ms), full_every,
buffer_every, hole_at with hole_bytes, die_after, dead, no_negative_depth (as newer daemons), semaphore_error,
mount_hang and ioctl_hang (calls on the mount block), other_pid_namespace (one client's end takes the buffers of all).
Faults of the mount reach a program's own calls with

  export LD_PRELOAD={mount_library}

Options can also be in the file that HF3FS_EMULATOR_CONTROL names; the emulator reads the file again when it changes.
HF3FS_EMULATOR_MAX_FILES caps the table of descriptors, which otherwise has the size of the hard limit of open files.
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
    from ..threefs_emulator import MOUNT_LIBRARY_NAME, build_emulator

    mount = directory.absolute()
    library = build_emulator(mount / ".3fs-emulator")
    mount_library = library.with_name(MOUNT_LIBRARY_NAME)
    text = _USE.format(library=library, mount=mount, lib_dir=library.parent, mount_library=mount_library)
    console().print(text, soft_wrap=True)
