"""What a training saves beside its model: states of optimizers and random generators, averaged copies, its progress.

Frameworks name these as they like, so the structure of the state dict decides as well: a key ``state`` next to
``param_groups``, the values that optimizers keep for each parameter, a group of tensors that repeats the model's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ...report.load_report import human_bytes

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_Keys: TypeAlias = tuple[str, ...]
_END = r"(?:_?\d+|_[a-z]|_?states?|_?state_dicts?)*"
_OPTIMIZER = re.compile(rf"(?:[a-z0-9]+_)*optim(?:izer)?s?{_END}|opt_?(?:states?|state_dicts?)(?:_?\d+)?")
_SCHEDULE = re.compile(rf"(?:[a-z]+_)*(?:lr_?)?schedulers?{_END}|(?:[a-z]+_)*data_?loaders?{_END}|grad_?scalers?{_END}")
_PROGRESS = re.compile(r"train(?:er|ing)?_(?:states?|progress)")
_SCALARS = re.compile(r"(?:global_)?steps?|lrs?|learning_rate|epochs?|iterations?|iter|consumed_samples|n_averaged")
_RNG = re.compile(rf"(?:[a-z0-9]+_)*(?:rng|random_states?|generator_states?){_END}(?:_tracker\w*)?")
_EXTRA_STATE = re.compile(r"_extra_state\d*(?:/.*)?")
_EMA = re.compile(
    rf"(?:[a-z0-9]+_)*ema(?:_[a-z]+)*{_END}|shadow_params?|(?:averaged|swa)_(?:model|weights|params){_END}"
)
_SLOTS = frozenset(
    [
        "exp_avg",
        "exp_avg_sq",
        "exp_avg_sq_row",
        "exp_avg_sq_col",
        "max_exp_avg_sq",
        "exp_avg_diff",
        "exp_inf",
        "momentum_buffer",
        "square_avg",
        "acc_delta",
        "grad_avg",
        "neg_pre_grad",
        "fp32_param",
    ]
)
"""The names of what optimizers keep for each parameter."""
_STRUCTURED = re.compile(r"(?:^|[.])(?:param_groups|" + "|".join(_SLOTS) + r")(?:[.]|$)")
_WRAPPING_KEYS = 3
"""So many keys may lie around a model's own names, in a state dict or in a copy of the model."""


class Beside(StrEnum):
    """A kind of tensor that belongs to the training and not to the model."""

    OPTIMIZER = "optimizer state"
    EMA = "averaged copies (EMA)"
    RNG = "random generators"
    EXTRA_STATE = "_extra_state"
    PROGRESS = "the training's progress"


class LeftOut:
    """An account of the tensors that are not served."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def count(self, kind: str, nbytes: int) -> None:
        """Count a tensor."""
        count = self._counts[kind]
        count[0] += 1
        count[1] += nbytes

    def line(self) -> str:
        """E.g. "left out: optimizer state (12 tensors, 3.1 GiB)"; "" where nothing was left out."""
        parts = [
            f"{kind} ({number} tensor{'' if number == 1 else 's'}, {human_bytes(nbytes)})"
            for kind, (number, nbytes) in self._counts.items()
        ]
        return f"left out: {', '.join(parts)}" if parts else ""


def beside_the_model(entries: Mapping[str, Any], paths: Mapping[str, Any]) -> dict[str, Beside]:
    """The tensors of a checkpoint that are not the model's, by name.

    Args:
        entries: the metadata of all items by name, of tensors and others.
        paths: the keys under which each item was in the nested state dict, by name.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    tensors = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    states = _optimizer_states(entries)
    found: dict[str, Beside] = {}
    for name, entry in tensors.items():
        kind = _by_name(name, _keys(name, paths.get(name)), entry)
        if kind is None and states and not _prefixes(tuple(name.split("."))).isdisjoint(states):
            kind = Beside.OPTIMIZER
        if kind is not None:
            found[name] = kind
    left = {name: tuple(entry.size) for name, entry in tensors.items() if name not in found}
    found |= dict.fromkeys(_averaged(left), Beside.EMA)
    return found


def is_averaged(name: str) -> bool:
    """Whether a name still says that it is of an averaged copy."""
    return _ema_depth(tuple(name.split("."))) is not None


def _keys(name: str, path: Any) -> _Keys:
    return tuple(map(str, path)) if isinstance(path, tuple) and len(path) > 1 else tuple(name.split("."))


def _by_name(name: str, keys: _Keys, entry: TensorStorageMetadata) -> Beside | None:
    """The kind of a tensor that its keys alone tell."""
    lower = [key.lower() for key in keys]
    if _EXTRA_STATE.fullmatch(name.rpartition(".")[2]):
        return Beside.EXTRA_STATE
    if any(map(_OPTIMIZER.fullmatch, lower[:-1])):
        return Beside.OPTIMIZER
    is_bytes = entry.properties.dtype == torch.uint8
    if any(_RNG.fullmatch(key.partition("/")[0]) for key in (lower if is_bytes else lower[:1])):
        return Beside.RNG
    is_scalar = prod(entry.size) <= 1
    if len(lower) > 1 and (_SCHEDULE.fullmatch(lower[0]) or (is_scalar and _PROGRESS.fullmatch(lower[0]))):
        return Beside.PROGRESS
    if is_scalar and len(lower) == 1 and _SCALARS.fullmatch(lower[0]):
        return Beside.PROGRESS
    return None


def _optimizer_states(names: Iterable[str]) -> set[_Keys]:
    """The keys below which there is an optimizer's state, by what optimizers keep."""
    names = list(names)
    structured = [tuple(name.split(".")) for name in names if _STRUCTURED.search(name)]
    states: set[_Keys] = set()
    slots: defaultdict[_Keys, set[str]] = defaultdict(set)
    grouped: set[_Keys] = set()
    for keys in structured:
        for depth, key in enumerate(keys):
            if key == "param_groups":
                grouped.add(keys[:depth])
            elif key in _SLOTS:
                slots[keys[:depth]].add(key)
                states.update(keys[: at + 1] for at in range(depth) if keys[at] == "state")
    whole = {prefix for name in names if grouped for prefix in _prefixes(tuple(name.split(".")))}
    for parent in grouped:
        if (*parent, "state") in whole:
            states |= {(*parent, "state"), (*parent, "param_groups")}
    several = {parent: kept for parent, kept in slots.items() if len(kept) > 1}
    states.update((*parent, slot) for parent, kept in several.items() for slot in (*kept, "step"))
    # Where there is no other copy of the parameter, the one for the optimizer is the model's.
    known = _tails(names) if several else frozenset()
    states.update((*parent, "fp32") for parent in several if known & _tails([".".join(parent)]))
    return states


def _averaged(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The tensors of copies of the model: of a group that is named so and of which most repeat other tensors."""
    groups: defaultdict[_Keys, list[tuple[str, _Keys]]] = defaultdict(list)
    for name in shapes:
        keys = tuple(name.split("."))
        depth = _ema_depth(keys[:-1])
        if depth is not None:
            groups[keys[: depth + 1]].append((name, keys[depth + 1 :]))
    if not groups:
        return []
    copies = {name for members in groups.values() for name, _ in members}
    others = [name for name in shapes if name not in copies]
    known = {(tail, shapes[name]) for name in others for tail in _tails([name])}
    other_shapes = {shapes[name] for name in others}
    found = []
    for members in groups.values():
        repeated = sum(
            shapes[name] in other_shapes
            if keys[-1].isdecimal()  # a list, without the parameters' names
            else any((tail, shapes[name]) in known for tail in _tails([".".join(keys)]))
            for name, keys in members
        )
        if 2 * repeated > len(members):
            found += [name for name, _ in members]
    return found


def _ema_depth(keys: Sequence[str]) -> int | None:
    return next((depth for depth, key in enumerate(keys) if _EMA.fullmatch(key.lower())), None)


def _tails(names: Iterable[str]) -> frozenset[str]:
    """Names without up to some of their first keys, and without dots: some copies leave these out."""
    found = set()
    for name in names:
        keys = name.split(".")
        found |= {"".join(keys[depth:]) for depth in range(min(_WRAPPING_KEYS, len(keys)))}
    return frozenset(found)


def _prefixes(keys: _Keys) -> set[_Keys]:
    return {keys[:length] for length in range(1, len(keys) + 1)}
