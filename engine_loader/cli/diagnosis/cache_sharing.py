"""Checks the store of the shared compile cache, and the fix-ups of engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...compile_cache.cache_errors import CacheError
from ...compile_cache.space import mib
from ...compile_cache.stores.opening import open_store
from ...engines.common import torch_fixups
from ...engines.vllm import fixups as vllm_fixups
from ...settings import load_settings
from .finding import Finding

_AREA = "compile cache"


def check_compile_cache() -> Iterator[Finding]:
    """The store, and each fix-up: whether it is needed and applied."""
    settings = load_settings().settings.compile_cache
    if not settings.enabled:
        yield Finding(_AREA, "state", "warn", "switched off", "set compile_cache.enabled: true")
        return
    try:
        store, trust = open_store(settings)
        packs = list(store.list())
        if Path(store.description).exists():
            trust.check_store(Path(store.description))
        size = mib(sum(pack.size for pack in packs))
        yield Finding(_AREA, "store", "ok", f"{store.description} ({len(packs)} packs, {size}, {trust.describe()})")
        for warning in trust.warnings:
            yield Finding(_AREA, "trust", "warn", warning, "see docs/security.md")
    except (OSError, CacheError) as error:
        yield Finding(
            _AREA, "store", "warn", str(error), "engines start without a compile cache until this is repaired"
        )
    for fixup in (*vllm_fixups.FIXUPS, *torch_fixups.FIXUPS):
        state = fixup.state()
        if state == "needed" and not settings.fixups:
            repair = f"set compile_cache.fixups: true, or apply patches/{fixup.patch}"
            yield Finding(_AREA, fixup.name, "warn", f"needed, and switched off: {fixup.why}", repair)
        elif state == "needed":
            replaced, unread = " ".join(fixup.upstream.split()), fixup.unread()
            remark = f" ({unread})" if unread else ""
            what = f"applied in {fixup.module} instead of `{replaced}`: {fixup.why}{remark}"
            yield Finding(_AREA, fixup.name, "ok", what)
        else:
            yield Finding(_AREA, fixup.name, "ok", f"not applied: {state}")
