"""A store whose tensors go through rules before they are handed out; those that are only renamed are read as before."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...errors import CheckpointError, EngineLoaderError
from ...formats.dtypes import DTYPE_BITS, header_shape
from ...formats.safetensors import TensorInfo
from ...report.load_report import LoadReport
from ...sources.source import Source
from ...transfer.plan import ExtentRow
from ...transfer.protocol import Transfer
from ..devices.per_tensor import TargetDevice, gpu_of, is_on_cpu
from ..shards import read_small_file
from ..store import TensorStore
from .rules import Rule, formatted


@dataclass(frozen=True, slots=True)
class _Mapped:
    """A tensor that is handed out: its description, what it is made of, and its number among what a rule makes."""

    info: TensorInfo
    inputs: tuple[TensorInfo, ...]
    rule: Rule | None
    number: int


class MappedStore(TensorStore):
    """The tensors of another store under other names, reordered, cut and joined by rules.

    A tensor is under the first rule that fits its name; others keep theirs.

    Args:
        store: the other one, which it closes.
        rules: from the store's tensors to those that are handed out.
        unwrapped: the name of a tensor that the rules are for.

    Raises:
        CheckpointError: two tensors get the same name, one that a rule needs is not there, or a shape does not allow
            what a rule does; the store is then closed.
    """

    key_mapping_applies = True
    streams_to_devices = False

    def __init__(
        self, store: TensorStore, rules: Sequence[Rule], unwrapped: Callable[[str], str] = lambda name: name
    ) -> None:
        self._store = store
        self.listing, self.paths, self.left_out = store.listing, store.paths, store.left_out
        self.ranges = store.ranges
        try:
            self._mapped = self._plan(rules, unwrapped)
        except BaseException:
            store.close()
            raise
        self._names = {mapped.inputs[0].name: name for name, mapped in reversed(self._mapped.items())}

    @property
    def infos(self) -> list[TensorInfo]:
        return list(self.located([mapped.info for mapped in self._mapped.values()]))

    def by_name(self) -> dict[str, TensorInfo]:
        return {name: mapped.info for name, mapped in self._mapped.items()}

    def metadata(self) -> dict[str, str]:
        return self._store.metadata()

    def other_items(self) -> dict[str, Callable[[], bytes]]:
        return self._store.other_items()

    def state_paths(self) -> Mapping[str, Any]:
        return self._store.state_paths()

    def located(self, infos: Sequence[TensorInfo]) -> list[TensorInfo]:
        first = self._store.located([self._input(info) for info in infos])
        return [replace(info, file=found.file, offset=found.offset) for info, found in zip(infos, first, strict=True)]

    def dtype_and_shape(self, info: TensorInfo) -> tuple[torch.dtype, tuple[int, ...]]:
        dtype, shape = self._store.dtype_and_shape(self._input(info))
        mapped = self._mapped[info.name]
        if mapped.rule is None:
            return dtype, shape
        return dtype, _shape_in_torch(info, dtype)

    def has_extents(self, info: TensorInfo) -> bool:
        return self._mapped[info.name].rule is None and self._store.has_extents(self._input(info))

    def file_number(self, info: TensorInfo) -> int:
        return self._store.file_number(self._input(info))

    def device_of(self, tensor: torch.Tensor) -> int | None:
        return self._store.device_of(tensor)

    def staging(self, target: torch.Tensor) -> torch.device:
        return torch.device("cpu")

    def submit(self, extents: Sequence[ExtentRow], owner: object, device: int | None = None) -> Transfer:
        return self._store.submit(extents, owner, device)

    def stream(
        self, infos: Iterable[TensorInfo], report: LoadReport, device: TargetDevice = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        gpu = gpu_of(device)
        wanted = [self._mapped[info.name] for info in infos]
        needed: list[TensorInfo] = []
        made_before: tuple[TensorInfo, ...] = ()
        for mapped in wanted:  # what a rule makes of a tensor is made at once
            if mapped.rule is None or mapped.inputs != made_before:
                needed += mapped.inputs
            made_before = () if mapped.rule is None else mapped.inputs
        coming = self._store.stream(needed, report)
        made: tuple[torch.Tensor, ...] = ()
        made_of: tuple[TensorInfo, ...] = ()
        for mapped in wanted:
            if mapped.rule is None:
                (_, tensor), made, made_of = next(coming), (), ()
            else:
                if mapped.inputs != made_of:
                    read = [next(coming)[1] for _ in mapped.inputs]
                    made, made_of = mapped.rule.apply(read, mapped.inputs[0].name), mapped.inputs
                    del read
                tensor = made[mapped.number]
            name = mapped.info.name
            yield name, tensor if gpu is None or is_on_cpu(device, name) else tensor.to(gpu)

    def tensor_at(self, file: str | None, offset: int | None) -> str | None:
        name = self._store.tensor_at(file, offset)
        return None if name is None else self._names.get(name, name)

    def finish(self, report: LoadReport) -> None:
        self._store.finish(report)

    def close(self) -> None:
        self._store.close()

    def _input(self, info: TensorInfo) -> TensorInfo:
        return self._mapped[info.name].inputs[0]

    def _plan(self, rules: Sequence[Rule], unwrapped: Callable[[str], str]) -> dict[str, _Mapped]:
        """What is handed out, in the order of the files: what is joined, where the first of its parts is."""
        inputs = self._store.by_name()
        groups: dict[tuple[int, str], dict[int, TensorInfo]] = {}
        order: list[tuple[Rule | None, dict[str, str], dict[int, TensorInfo]]] = []
        for name, info in inputs.items():
            plain = unwrapped(name)
            number, found = next(
                ((number, found) for number, rule in enumerate(rules) if (found := rule.match(plain))), (0, None)
            )
            if found is None:
                order.append((None, {"": plain}, {0: info}))
                continue
            rule, (which, places) = rules[number], found
            if rule.combine == "stack":
                place = rule.number_place
                assert place is not None
                which = _number(places.pop(place), name)
            elif rule.combine != "join":
                order.append((rule, places, {0: info}))
                continue
            key = (number, formatted(rule.target[0], places))
            if key not in groups:
                groups[key] = {}
                order.append((rule, places, groups[key]))
            groups[key][which] = info
        mapped: dict[str, _Mapped] = {}
        for made in (each for rule, places, found in order for each in self._made(rule, places, found)):
            if made.info.name in mapped:
                before = mapped[made.info.name].inputs[0].name
                raise CheckpointError(
                    f"{before!r} and {made.inputs[0].name!r} both become {made.info.name!r}",
                    file=self.listing,
                    hint="correct key_mapping",
                )
            mapped[made.info.name] = made
        return mapped

    def _made(self, rule: Rule | None, places: dict[str, str], found: Mapping[int, TensorInfo]) -> Iterator[_Mapped]:
        """What a rule makes of the tensors that were found for it, by their numbers."""
        inputs = tuple(found[number] for number in sorted(found))
        first = inputs[0]
        if rule is None or not rule.changes:
            targets = [places[""]] if rule is None else [formatted(target, places) for target in rule.target]
            for name in targets:  # none where the rule leaves it out
                yield _Mapped(replace(first, name=name), inputs, None, 0)
            return
        count = len(rule.source) if rule.combine == "join" else len(inputs)
        missing = sorted(set(range(count)) - set(found))
        if missing or any(info.dtype != first.dtype for info in inputs):
            what = f"number {missing[0]} is missing" if missing else "their element types differ"
            raise CheckpointError(
                f"{first.name!r} and others are to become {formatted(rule.target[0], places)!r}, and {what}",
                file=first.file,
                hint="a part of the checkpoint is missing, or key_mapping is of another model",
            )
        shapes = [self._store.dtype_and_shape(info) for info in inputs]
        blank = [torch.empty(shape, dtype=dtype, device="meta") for dtype, shape in shapes]
        dtype = shapes[0][0]
        bits = DTYPE_BITS.get(first.dtype, 8 * dtype.itemsize)
        for number, made in enumerate(rule.apply(blank, first.name)):
            if rule.combine == "unstack":
                assert rule.number_place is not None
                name = formatted(rule.target[0], {**places, rule.number_place: str(number)})
            else:
                name = formatted(rule.target[number], places)
            shape = tuple(made.shape) if bits >= 8 else header_shape(first.dtype, tuple(made.shape))
            nbytes = math.prod(made.shape) * dtype.itemsize
            yield _Mapped(TensorInfo(name, first.dtype, shape, first.file, first.offset, nbytes), inputs, rule, number)


def head_dim_beside(source: Source, directory: str) -> int | None:
    """The rows of an attention head by the config.json beside a checkpoint; None where it does not tell."""
    try:
        config: Any = json.loads(read_small_file(source, os.path.join(directory, "config.json")))
        config = config.get("text_config") or config
        found = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    except (EngineLoaderError, OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None
    return found if isinstance(found, int) else None


def _number(text: str, name: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > len(str(2**31)):
        raise CheckpointError(f"key_mapping: {name!r} has {text!r} where a number is to be stacked by")
    return int(text)


def _shape_in_torch(info: TensorInfo, dtype: torch.dtype) -> tuple[int, ...]:
    bits = DTYPE_BITS.get(info.dtype, 8 * dtype.itemsize)
    return info.shape if bits >= 8 or not info.shape else (*info.shape[:-1], info.shape[-1] * bits // 8)
