"""Two starts, phase by phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .critical_path import Stretch, seconds_by_phase

_NOISE_S = 0.2


@dataclass(frozen=True)
class PhaseChange:
    """One phase in two starts: seconds of their critical paths."""

    phase: str
    before: float
    after: float

    @property
    def difference(self) -> float:
        return self.after - self.before

    def slower(self, threshold: float) -> bool:
        """Whether it takes longer by more than the share ``threshold`` (0.2: by a fifth), and not by a trifle."""
        return self.difference > max(_NOISE_S, threshold * self.before)


@dataclass(frozen=True)
class Comparison:
    """Two starts.

    Attributes:
        whole: from exec to ready.
        phases: those of either start, the largest difference first.
    """

    whole: PhaseChange
    phases: list[PhaseChange]

    def slower(self, threshold: float) -> list[PhaseChange]:
        """The phases, and the whole, that take longer by more than ``threshold``; the whole first."""
        return [change for change in (self.whole, *self.phases) if change.slower(threshold)]


def compare(before: Sequence[Stretch], after: Sequence[Stretch]) -> Comparison:
    """Compare the critical paths of two starts."""
    first, second = seconds_by_phase(before), seconds_by_phase(after)
    changes = [PhaseChange(name, first.get(name, 0.0), second.get(name, 0.0)) for name in {**first, **second}]
    whole = PhaseChange("exec to ready", sum(first.values()), sum(second.values()))
    return Comparison(whole, sorted(changes, key=lambda change: -abs(change.difference)))
