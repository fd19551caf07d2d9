"""Fix-ups (fixups.py) of torch: faults that keep a restored cache from being used."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from ...replacing import wrap
from .fixups import Fixup, apply_needed


def register() -> None:
    """Apply the fix-ups that `torch._inductor.codecache`, just imported, needs."""
    from torch._inductor import codecache

    apply_needed(FIXUPS, codecache)


def _no_header_for_what_is_compiled(codecache: Any) -> None:
    """Pass over the header where the library that it would be compiled into is there.

    `load_async` writes a kernel's source, then asks for the header, then compiles if there is no library of the
    source's name. Without a header, as without cpp_cache_precompile_headers, it would compile the same, only slower.
    """
    current = threading.local()

    def write_and_look(write: Callable[..., Any], *args: Any, **options: Any) -> Any:
        basename, path = write(*args, **options)
        source = str(path)
        if source.endswith(".cpp"):
            # Code in two parts is linked from objects, which may be gone.
            current.compiled = not source.endswith(".optimized.cpp") and os.path.exists(source[: -len("cpp")] + "so")
        return basename, path

    def precompile_if_needed(precompile: Callable[..., Any], *args: Any, **options: Any) -> str:
        return "" if getattr(current, "compiled", False) else str(precompile(*args, **options))

    wrap(codecache, "write", write_and_look)
    wrap(codecache, "_precompile_header", precompile_if_needed)


FIXUPS = (
    Fixup(
        name="inductor-header-on-hit",
        distribution="torch",
        module="torch._inductor.codecache",
        read_up_to=(2, 14),
        upstream=(
            "                if header := cls._get_uncompiled_header(device_type):\n"
            "                    main_build_option.precompiled_header = _precompile_header(\n"
        ),
        why="inductor precompiles its header (150 MB, seconds) before it looks whether the kernel's library is there "
        "already, so that a start on a restored cache compiles a header for nothing",
        patch="torch-2.13-inductor-header-on-hit.patch",
        apply=_no_header_for_what_is_compiled,
    ),
)
