"""Did the cache help? And where it did not: which fact differs between the machine that made it and this one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..settings import CompileCacheSettings
from .directories import STATE, directories_of
from .key import CacheKey
from .pack import Pack
from .scan import LocalFile
from .trust import make_private

_LAST = "last.json"
_COMPILED = ("torch_compile_cache", "torch_aot_compile")
_MOST_LINES = 12
_SHOWN_CHARS = 80
_NOT_A_REASON = {"env.VLLM_CACHE_ROOT"}


@dataclass(frozen=True)
class Verdict:
    """What a restored cache was good for.

    Attributes:
        result: "hit": nothing was compiled; "partial": something was, for keys that the cache has; "miss": the engine
            looked for another key than the cache has, or there was no cache.
        reasons: a line each for a person.
    """

    result: Literal["hit", "partial", "miss"]
    reasons: list[str] = field(default_factory=list)


def judge(packs: list[Pack], new: Iterable[LocalFile], factors: Mapping[str, Any]) -> Verdict:
    """Compare what was restored with what is there after warm-up.

    Args:
        packs: what was in the store for the key when the engine started.
        new: files that came since, and that no pack has.
        factors: path -> content of the engine's `cache_key_factors.json` files among ``new``.
    """
    if not packs:
        return Verdict("miss", ["the store had nothing for this environment and scope"])
    # Diagnoses and kernels' sources come with a hit, too: compiled is what has code in it.
    compiled = [file for file in new if _kind(file.path) is not None]
    if not compiled:
        return Verdict("hit")
    known = {kind for pack in packs for file in pack.manifest.files if (kind := _kind(file.path)) is not None}
    unknown = sorted({kind for file in compiled if (kind := _kind(file.path)) is not None} - known)
    if not unknown:
        return Verdict("partial", [f"{len(compiled)} files were compiled that the cache did not have"])
    old = [item for pack in packs for item in pack.manifest.factors.items()]
    reasons = list(_differences(old, factors))
    return Verdict("miss", reasons or ["the engine looked under another key, and does not say why"])


def _kind(path: str) -> str | None:
    """The engine's own key in a path (its hash directory), or None for what is not compiled by a model's key."""
    parts = path.split("/")
    for index, part in enumerate(parts[:-1]):
        if part in _COMPILED and index + 2 < len(parts):
            below = parts[index + 1]
            return f"{below}/{parts[index + 2]}" if below in _COMPILED and index + 3 < len(parts) else below
    return None


def _differences(old: list[tuple[str, Any]], new: Mapping[str, Any]) -> Iterator[str]:
    """The fewest differences between what is new and anything that the cache has."""
    shown: set[str] = set()
    for path, here in new.items():
        before = [flat for place, value in old if _same_part(place, path) and (flat := _flat(value)) is not None]
        flat_here = _flat(here)
        if not before or flat_here is None:
            continue
        nearest = min((_changes(there, flat_here) for there in before), key=len)
        for name, there, value in nearest:
            line = f"{name} was {_short(there)} when this cache was made, is {_short(value)} now"
            if line not in shown and len(shown) < _MOST_LINES:
                shown.add(line)
                yield line


def _same_part(one: str, other: str) -> bool:
    """The same rank and part of a model, whatever the hash directory."""
    return _part(one) == _part(other)


def _part(path: str) -> list[str]:
    parts = path.split("/")
    return parts[-1:] if parts[0] == "engine" else parts[-3:]


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names = dict.fromkeys([*old, *new])
    return [
        (name.removeprefix("env."), old.get(name, "not set"), new.get(name, "not set"))
        for name in names
        if old.get(name) != new.get(name) and name not in _NOT_A_REASON
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any] | None:
    """Nested mappings as one with dotted names."""
    if not isinstance(value, Mapping):
        return None
    found: dict[str, Any] = {}
    for name, item in value.items():
        inner = _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else None
        found |= inner if inner is not None else {f"{prefix}{name}": item}
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def nearest_key(key: CacheKey, others: Iterable[CacheKey]) -> list[str]:
    """How ``key`` differs from the most similar of ``others``; nothing when there is none, or one that is the same."""
    differences = [key.differs_from(other) for other in others]
    nearest = min(differences, key=len, default=[])
    return [f"{name} was {there} when the nearest cache was made, is {here} now" for name, here, there in nearest]


def note_verdict(root: Path, key: CacheKey, verdict: Verdict) -> None:
    """Keep what was found out in the cache ``root``, for `engine-loader compile-cache explain`."""
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
    from .operations import nearest_in_store, open_store

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
