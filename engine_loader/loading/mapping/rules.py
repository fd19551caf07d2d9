"""A rule: which tensors become which, and what is done to their elements. Each has an inverse.

Names are templates: ``layers.{l}.wq.weight`` stands for any layer, and what ``{l}`` stood for is put into new names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch

from ...errors import CheckpointError, SettingsError

Rows: TypeAlias = Literal["pairs_to_halves", "halves_to_pairs"]
Combine: TypeAlias = Literal["split", "join", "unstack", "stack"]
_INVERSE: Mapping[str, Any] = {
    "pairs_to_halves": "halves_to_pairs",
    "halves_to_pairs": "pairs_to_halves",
    "split": "join",
    "join": "split",
    "unstack": "stack",
    "stack": "unstack",
}
_PLACE = re.compile(r"\{(\w+)\}")
_KEYS = {"from", "to", "rows", "head_dim", "transpose", "split", "join", "unstack", "stack"}
_TENSORS = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Rule:
    """What becomes of tensors whose names fit.

    Attributes:
        source: the templates of the names; several are joined, in this order.
        target: those of the new names; () leaves the tensors out, several get parts, in this order.
        rows: the rows of each head (the elements, of a tensor of one dimension), from neighbouring pairs to two halves
            or back: the two orders of rotary embeddings.
        head_dim: the rows of a head.
        transpose: exchange the last two dimensions.
        combine: "split" into equal parts or "join" along ``dim``; "unstack" the first dimension into tensors whose
            number takes a place that only the target has, or "stack" such tensors.
        dim: see ``combine``.

    ``rows`` and ``transpose`` are done to each tensor on the side that has more of them.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    rows: Rows | None = None
    head_dim: int | None = None
    transpose: bool = False
    combine: Combine | None = None
    dim: int = 0

    @property
    def changes(self) -> bool:
        """Whether it does more than rename."""
        return self.rows is not None or self.transpose or self.combine is not None

    def inverse(self) -> Rule:
        """The rule that leads back."""
        rows, combine = _INVERSE.get(self.rows or ""), _INVERSE.get(self.combine or "")
        return replace(self, source=self.target, target=self.source, rows=rows, combine=combine)

    def match(self, name: str) -> tuple[int, dict[str, str]] | None:
        """(number of the template, what its places stand for), where a name fits."""
        for number, pattern in enumerate(self._patterns):
            found = pattern.fullmatch(name)
            if found is not None:
                return number, found.groupdict()
        return None

    @cached_property
    def number_place(self) -> str | None:
        """The place that stands for the number of a tensor among those that are stacked."""
        one, many = (self.target, self.source) if self.combine == "stack" else (self.source, self.target)
        left = set(_PLACE.findall(many[0])) - set(_PLACE.findall(one[0])) if one and many else set()
        return left.pop() if len(left) == 1 else None

    def apply(self, tensors: Sequence[torch.Tensor], name: str) -> _TENSORS:
        """The new tensors, in memory of their own where they are changed.

        Args:
            tensors: in the order of ``source``, or of their numbers.
            name: of the first, for messages.

        Raises:
            CheckpointError: their shapes do not allow it.
        """
        try:
            if self.combine in ("split", "unstack"):
                (whole,) = tensors
                return tuple(self._each(part, name).contiguous() for part in self._parts(whole, name))
            done = [self._each(tensor, name) for tensor in tensors]
            if self.combine == "join":
                return (torch.cat(done, dim=self.dim),)
            if self.combine == "stack":
                return (torch.stack(done),)
            return (done[0].contiguous(),)
        except (RuntimeError, IndexError, ValueError) as error:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors[:3])
            raise CheckpointError(
                f"key_mapping: {name!r} {shapes} cannot be changed as its rule says: {str(error).splitlines()[0]}"
            ) from None

    def _parts(self, whole: torch.Tensor, name: str) -> Sequence[torch.Tensor]:
        if self.combine == "unstack":
            return whole.unbind(0)
        count = len(self.target)
        if whole.shape[self.dim] % count:
            raise CheckpointError(
                f"key_mapping: {name!r} {list(whole.shape)} is to be split into {count} equal parts along dimension "
                f"{self.dim}"
            )
        return whole.chunk(count, dim=self.dim)

    def _each(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        if self.transpose:
            tensor = tensor.transpose(-1, -2)
        if self.rows is None:
            return tensor
        assert self.head_dim is not None
        rows = tensor.shape[0]
        if rows % self.head_dim:
            raise CheckpointError(f"{name!r} has {rows} rows, which are not heads of {self.head_dim}")
        half = self.head_dim // 2
        within = (half, 2) if self.rows == "pairs_to_halves" else (2, half)
        return tensor.reshape(-1, *within, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [_pattern(template) for template in self.source]


def formatted(template: str, places: Mapping[str, str]) -> str:
    """A template with its places filled."""
    return _PLACE.sub(lambda found: places[found[1]], template)


def parse_rules(value: Sequence[Mapping[str, Any]]) -> list[Rule]:
    """Rules as they stand in the setting ``key_mapping``.

    Raises:
        SettingsError: one of them makes no sense; it says which and why.
    """
    return [_rule(item, f"rule {number} of key_mapping") for number, item in enumerate(value, start=1)]


def _rule(item: Any, what: str) -> Rule:
    if not isinstance(item, Mapping) or "from" not in item or "to" not in item:
        raise SettingsError(f"{what} is {item!r}; it takes from, to, and what is to be done")
    unknown = set(item) - _KEYS
    if unknown:
        raise SettingsError(f"{what} has {sorted(map(str, unknown))}; known are {', '.join(sorted(_KEYS))}")
    source, target = _names(item["from"], what), () if item["to"] is None else _names(item["to"], what)
    rows, head_dim = item.get("rows"), item.get("head_dim")
    if rows is not None and rows not in ("pairs_to_halves", "halves_to_pairs"):
        raise SettingsError(f"{what}: rows is {rows!r}; it takes pairs_to_halves or halves_to_pairs")
    if rows is not None and (type(head_dim) is not int or head_dim < 2 or head_dim % 2):
        raise SettingsError(f"{what}: rows needs head_dim, the rows of a head, an even number; it is {head_dim!r}")
    # 0 is a dimension, and equals False.
    ways: list[Combine] = [
        way for way in ("split", "join", "unstack", "stack") if item.get(way) is not None and item[way] is not False
    ]
    if len(ways) > 1:
        raise SettingsError(f"{what} has {' and '.join(ways)}; it takes one of them")
    combine = ways[0] if ways else None
    dim = item[combine] if combine in ("split", "join") else 0
    if type(dim) is not int:
        raise SettingsError(f"{what}: {combine} is {dim!r}; it takes the number of a dimension")
    if type(item.get("transpose", False)) is not bool:
        raise SettingsError(f"{what}: transpose is {item['transpose']!r}; it takes true or false")
    rule = Rule(source, target, rows, head_dim, bool(item.get("transpose")), combine, dim)
    _check(rule, what)
    return rule


def _check(rule: Rule, what: str) -> None:
    """Refuse a rule whose names do not fit what it does."""
    counts = {"split": (1, None), "join": (None, 1), "unstack": (1, 1), "stack": (1, 1), None: (1, 1)}
    for names, count, side in zip((rule.source, rule.target), counts[rule.combine], ("from", "to"), strict=True):
        if not names and side == "to" and not rule.changes:
            return
        if (len(names) < 2) if count is None else (len(names) != count):
            wanted = "at least two names" if count is None else "one name"
            raise SettingsError(f"{what}: {rule.combine or 'a rule without split or join'} takes {wanted} in {side}")
    places = [set(_PLACE.findall(name)) for name in (*rule.source, *rule.target)]
    if rule.combine in ("stack", "unstack"):
        one, many = (places[1], places[0]) if rule.combine == "stack" else (places[0], places[1])
        if not one < many or len(many - one) != 1:
            raise SettingsError(f"{what}: {rule.combine} takes one {{place}} more in the names of the many tensors")
    elif any(found != places[0] for found in places):
        raise SettingsError(f"{what}: every name must have the same {{places}}")


def _names(value: Any, what: str) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) and name for name in names):
        raise SettingsError(f"{what}: {value!r} is neither a name nor a list of names")
    for name in names:
        found = _PLACE.findall(name)
        if len(found) != len(set(found)) or "{" in _PLACE.sub("", name) or "}" in _PLACE.sub("", name):
            raise SettingsError(f"{what}: {name!r} is no name with {{places}}, each once")
        if any(place[:1].isdigit() for place in found):
            raise SettingsError(f"{what}: the places of {name!r} must begin with letters")
    return tuple(names)


def _pattern(template: str) -> re.Pattern[str]:
    parts = _PLACE.split(template)  # text and names of places, in turns
    return re.compile(
        "".join(rf"(?P<{part}>[^.]+)" if number % 2 else re.escape(part) for number, part in enumerate(parts))
    )
