"""What `engine-loader compile-cache explain` shows: the last verdict on this node, and the nearest key in the store."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...settings import CompileCacheSettings
from ..cache_errors import CacheValidationError
from ..directories import STATE, directories_of
from ..key import CacheKey
from ..packs.pack import read_manifest
from ..stores.interface import Store
from ..stores.opening import open_store
from ..trust import Trust, make_private
from .judge import Verdict

_LAST = "last.json"
_MOST_KEYS_COMPARED = 50


def nearest_key(key: CacheKey, others: Iterable[CacheKey]) -> list[str]:
    """How ``key`` differs from the most similar of ``others``; empty when there is none, or an equal one."""
    differences = [key.differs_from(other) for other in others]
    nearest = min(differences, key=len, default=[])
    return [f"{name} was {there} when the nearest cache was made, is {here} now" for name, here, there in nearest]


def note_verdict(root: Path, key: CacheKey, verdict: Verdict) -> None:
    """Write the verdict into the cache ``root``, for `engine-loader compile-cache explain`."""
    make_private(root / STATE)
    value = {"key": key.to_json(), "when": time.time(), "verdict": verdict.result, "reasons": verdict.reasons}
    unfinished = root / STATE / f"{_LAST}.{os.getpid()}.tmp"
    unfinished.write_text(json.dumps(value))
    unfinished.replace(root / STATE / _LAST)


def last_key(root: Path) -> CacheKey | None:
    """The key that an engine used last here."""
    last = _last(root)
    return None if last is None else CacheKey.from_json(last["key"])


def account(engine: str, settings: CompileCacheSettings, key: CacheKey) -> dict[str, Any]:
    """What `explain` shows: the last verdict here, and how the nearest key in the store differs from this
    environment.
    """
    last = _last(next(iter(directories_of(engine).values())))
    store, trust = open_store(settings)
    here = key if last is None else CacheKey(key.parts, CacheKey.from_json(last["key"]).scope)
    if last is not None:
        last = {
            "scope": last["key"]["scope"],
            "verdict": last["verdict"],
            "reasons": last["reasons"],
            "when": last["when"],
        }
    differences = nearest_in_store(store, here, trust)
    if last is None:  # no scope is known to compare
        differences = [line for line in differences if not line.startswith("scope ")]
    return {"last": last, "environment": differences, "hash": key.hash}


def _last(root: Path) -> dict[str, Any] | None:
    try:
        value = json.loads((root / STATE / _LAST).read_text())
        CacheKey.from_json(value["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(value)


def nearest_in_store(store: Store, key: CacheKey, trust: Trust) -> list[str]:
    """How ``key`` differs from the nearest one that has packs: a line for each part."""
    others: dict[str, CacheKey] = {}
    for stored in sorted(store.list(), key=lambda item: item.modified, reverse=True):
        if stored.key_prefix in others or len(others) >= _MOST_KEYS_COMPARED:
            continue
        try:
            others[stored.key_prefix] = read_manifest(store, stored, stored.key_prefix, trust).manifest.key
        except (OSError, CacheValidationError):
            continue
    names = {name for name, _ in key.parts}
    alike = [other for other in others.values() if len(names & {name for name, _ in other.parts}) * 2 > len(names)]
    return nearest_key(key, alike)
