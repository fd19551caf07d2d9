"""The verdict: whether a restored cache served, and where it did not, which facts differ from when it was made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..packs.pack import Pack
from ..packs.scan import LocalFile
from .compiled import Compiler, piece_of

_MOST_LINES = 12
_MOST_NAMES = 3
_SHOWN_CHARS = 80
_NOT_A_REASON = {"env.VLLM_CACHE_ROOT"}


@dataclass(frozen=True)
class Verdict:
    """Whether a restored cache served.

    Attributes:
        result: "hit": nothing was compiled; "partial": something was, beside what the cache has; "miss": the engine
            looked for another key than the cache has, or compiled as much as the cache has of anything, or there was
            no cache; "refused": the restore left alone what it should have filled, so that the engine could not use
            what the store has. Empty: there was no cache, and none was needed.
        reasons: a line each for a person.
    """

    result: Literal["hit", "partial", "miss", "refused", ""]
    reasons: list[str] = field(default_factory=list)


def judge(
    packs: list[Pack], new: Iterable[LocalFile], factors: Mapping[str, Any], refused: Sequence[str] = ()
) -> Verdict:
    """Compare what was restored with what is there after warm-up.

    Args:
        packs: what was in the store for the key when the engine started.
        new: files that came since, and that no pack has.
        factors: name -> what the engine's keys are made of, as far as known: the engine's
            `cache_key_factors.json` files among ``new``, by their paths, and what its ranks noted.
        refused: what the restore left alone, and why.
    """
    if refused:  # what lies there is not looked at, so that no other verdict could be told
        return Verdict("refused", [f"the restore was refused: {reason}" for reason in refused])
    # A hit writes diagnoses and sources of kernels, too: only files with compiled code count.
    made = _by_compiler(file.path for file in new)
    if not packs:
        return Verdict("miss", ["the store had nothing for this environment and scope"]) if made else Verdict("")
    if not made:
        return Verdict("hit")
    had = _by_compiler(file.path for pack in packs for file in pack.manifest.files)
    missed = {compiler for compiler in {**made, **had} if _is_missed(compiler, made, had)}
    is_miss = any(compiler.whole for compiler in missed) or missed >= had.keys()
    another_key = {compiler for compiler in missed if compiler.whole}
    lines = [_line_about(compiler, found, had) for compiler, found in made.items() if compiler not in another_key]
    differences: list[str] = []
    if another_key or any(not compiler.whole for compiler in made):
        old = [item for pack in packs for item in pack.manifest.factors.items()]
        differences = list(_differences(old, factors))
    if another_key and not differences:
        differences = ["the engine looked under another key, and does not say why"]
    return Verdict("miss" if is_miss else "partial", [*lines, *differences])


@dataclass
class _Found:
    """What a compiler made: how many files, and the name that a person knows each key by."""

    files: int = 0
    keys: dict[str, str] = field(default_factory=dict)


def _by_compiler(paths: Iterable[str]) -> dict[Compiler, _Found]:
    found: dict[Compiler, _Found] = {}
    for path in paths:
        if (piece := piece_of(path)) is not None:
            of = found.setdefault(piece.compiler, _Found())
            of.files += 1
            of.keys[piece.key] = piece.name
    return found


def _is_missed(compiler: Compiler, made: Mapping[Compiler, _Found], had: Mapping[Compiler, _Found]) -> bool:
    """Whether what the cache has of a compiler did not serve. Where each piece has a key, paths do not show which were
    used: as many new pieces as old ones count as their replacement.
    """
    new = made.get(compiler, _Found()).keys.keys()
    old = had.get(compiler, _Found()).keys.keys()
    return bool(new - old) if compiler.whole else bool(new) and len(new) >= len(old)


def _line_about(compiler: Compiler, made: _Found, had: Mapping[Compiler, _Found]) -> str:
    """A line about what was compiled, and what the cache has of that kind."""
    if compiler.whole:
        return f"{made.files} files were compiled that the cache did not have"
    names = sorted({name for name in made.keys.values() if name})
    shown = ", ".join(names[:_MOST_NAMES]) + (", …" if len(names) > _MOST_NAMES else "")
    count = len(made.keys)
    what = f"{count} {compiler.one if count == 1 else compiler.many}{f' ({shown})' if names else ''}"
    old = had.get(compiler, _Found()).keys
    others = len(old.keys() - made.keys.keys())
    it = "it" if count == 1 else "them"
    if not old:
        like = "none"
    elif made.keys.keys() <= old.keys():
        like = "it, but not as it is now" if count == 1 else "them, but not as they are now"
    elif names and set(names) <= set(old.values()):
        like = f"{it} under {'another key' if count == 1 else 'other keys'}"
    else:
        like = f"{others} other{'s' if others > 1 else ''}"
    return f"{what} compiled anew: the cache has {like}"


def _differences(old: list[tuple[str, Any]], new: Mapping[str, Any]) -> Iterator[str]:
    """The fewest differences between what is new and anything that the cache has."""
    shown: set[str] = set()
    for path, here in new.items():
        before = [flat for other, value in old if _same_part(other, path) and (flat := _flat(value)) is not None]
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
