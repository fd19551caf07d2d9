"""Chooses the names of each rank's objects. The throughput of an object store grows with the number of prefixes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch.distributed

_DIGITS = "0123456789abcdef"


class S3PrefixStrategyBase(ABC):
    """Names the objects of a rank: the result of ``generate_prefix``, followed by "0.distcp", "1.distcp", …"""

    def __call__(self, rank: int) -> str:
        return self.generate_prefix(rank)

    @abstractmethod
    def generate_prefix(self, rank: int) -> str:
        """The prefix of the names of this rank's objects, relative to the checkpoint. It must differ between ranks."""

    def is_of(self, rank: int, prefix: str) -> bool:
        """Whether the objects of this rank have this prefix, in a world of any size."""
        try:
            return self.generate_prefix(rank) == prefix
        except Exception:  # a strategy of one's own may know the ranks of one world only
            return False


class DefaultPrefixStrategy(S3PrefixStrategyBase):
    """``__3_`` for rank 3: the names that FileSystemWriter gives to files."""

    def generate_prefix(self, rank: int) -> str:
        return _file_prefix(rank)


class NumericPrefixStrategy(S3PrefixStrategyBase):
    """Puts a number before each name, last digit first, so that the first characters of names differ between ranks.

    Rank 3 of base 2 writes to ``1100000000/__3_``, in epoch 5 to ``1100000000/epoch_5/__3_``.

    Args:
        base: of the number, 2 to 16.
        epoch_num: adds ``epoch_N/`` to the prefix; None: adds nothing.
        min_prefix_length: the least number of digits; zeros are added.
        prefix_count: how many different numbers; None: one for each rank of the process group, 1 without a group.

    Raises:
        ValueError: an argument is out of its range, or not an integer.
    """

    def __init__(
        self,
        base: int,
        epoch_num: int | None = None,
        min_prefix_length: int = 10,
        prefix_count: int | None = None,
    ) -> None:
        if not _is_integer(base) or not 2 <= base <= len(_DIGITS):
            raise ValueError(f"base is {base!r}; it must be an integer of 2 to {len(_DIGITS)}")
        if not _is_integer(min_prefix_length) or min_prefix_length < 1:
            raise ValueError(f"min_prefix_length is {min_prefix_length!r}; it must be an integer of at least 1")
        if prefix_count is not None and (not _is_integer(prefix_count) or prefix_count < 1):
            raise ValueError(f"prefix_count is {prefix_count!r}; it must be an integer of at least 1, or None")
        self.base = base
        self.epoch_num = _checked_epoch(epoch_num)
        self.min_prefix_len = min_prefix_length
        self.prefix_count = _world_size() if prefix_count is None else prefix_count
        length = max(_digits_needed(base, self.prefix_count), min_prefix_length)
        self.prefix_map = [_reversed_digits(number, base, length) for number in range(self.prefix_count)]

    def generate_prefix(self, rank: int) -> str:
        return f"{self.prefix_map[rank % self.prefix_count]}/{_epoch_part(self.epoch_num)}{_file_prefix(rank)}"

    def is_of(self, rank: int, prefix: str) -> bool:
        """Whether the objects of this rank have this prefix, whatever ``prefix_count`` is."""
        digits, _, end = prefix.partition("/")
        if end != f"{_epoch_part(self.epoch_num)}{_file_prefix(rank)}" or len(digits) < self.min_prefix_len:
            return False
        return set(digits) <= set(_DIGITS[: self.base]) and int(digits[::-1], self.base) <= rank


class BinaryPrefixStrategy(NumericPrefixStrategy):
    """``1000000000/__1_`` for rank 1; see NumericPrefixStrategy."""

    def __init__(
        self, epoch_num: int | None = None, min_prefix_length: int = 10, prefix_count: int | None = None
    ) -> None:
        super().__init__(2, epoch_num, min_prefix_length, prefix_count)


class HexPrefixStrategy(NumericPrefixStrategy):
    """``a000000000/__10_`` for rank 10 of 16; see NumericPrefixStrategy."""

    def __init__(
        self, epoch_num: int | None = None, min_prefix_length: int = 10, prefix_count: int | None = None
    ) -> None:
        super().__init__(16, epoch_num, min_prefix_length, prefix_count)


class RoundRobinPrefixStrategy(S3PrefixStrategyBase):
    """Gives the prefixes of a list to the ranks in turn.

    Args:
        user_prefixes: without slashes at their ends, e.g. ``["a", "b"]``: rank 2 writes to ``a/__2_``.
        epoch_num: adds ``epoch_N/`` to the prefix; None: adds nothing.

    Raises:
        ValueError: there are no prefixes, a prefix is not a string, or ``epoch_num`` is not an integer.
    """

    def __init__(self, user_prefixes: Sequence[str], epoch_num: int | None = None) -> None:
        if isinstance(user_prefixes, str) or not all(isinstance(prefix, str) for prefix in user_prefixes):
            raise ValueError(f"user_prefixes is {user_prefixes!r}; it must be a list of strings")
        if not user_prefixes:
            raise ValueError("user_prefixes is empty; give at least one prefix")
        self.user_prefixes = list(user_prefixes)
        self.epoch_num = _checked_epoch(epoch_num)

    def generate_prefix(self, rank: int) -> str:
        prefix = self.user_prefixes[rank % len(self.user_prefixes)]
        return f"{prefix}/{_epoch_part(self.epoch_num)}{_file_prefix(rank)}"


def _file_prefix(rank: int) -> str:
    return f"__{rank}_"


def _epoch_part(epoch: int | None) -> str:
    return "" if epoch is None else f"epoch_{epoch}/"


def _checked_epoch(epoch: int | None) -> int | None:
    if epoch is not None and not _is_integer(epoch):
        raise ValueError(f"epoch_num is {epoch!r}; it must be an integer, or None")
    return epoch


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _world_size() -> int:
    has_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if has_group else 1


def _digits_needed(base: int, count: int) -> int:
    length = 1
    while base**length < count:
        length += 1
    return length


def _reversed_digits(number: int, base: int, length: int) -> str:
    digits = ""
    for _ in range(length):
        number, digit = divmod(number, base)
        digits += _DIGITS[digit]
    return digits
