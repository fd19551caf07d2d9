"""Runs contenders in interleaved rounds, so that other work of the machine slows all of them about equally."""

from __future__ import annotations

import gc
import mmap
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..errors import EngineLoaderError
from ..machine import cpu_time
from ..report.load_report import human_bytes
from . import page_cache
from .contenders import Contender
from .workload import Parameters, Workload

# Above this, a "cold" read was partly warm.
_RESIDENT_SHARE = 0.01
_MUCH_OF_THE_MACHINE = 0.1
_FEWEST_BYTES = 256 << 20
_LOOK_S = 0.5
Progress = Callable[[str], None]
"""A function that is called before every run, with the name of the run."""


@dataclass(frozen=True)
class Scenario:
    """The conditions of a measurement.

    Attributes:
        fresh: the parameters were not touched before, so that the kernel makes their pages during the read.
        cold: the page cache does not hold the files.
        remote: they are objects of an object store.
    """

    fresh: bool = False
    cold: bool = False
    remote: bool = False

    @property
    def title(self) -> str:
        """E.g. "warm page cache, into touched parameters"."""
        where = "an object store" if self.remote else f"{'cold' if self.cold else 'warm'} page cache"
        return f"{where}, into {'fresh' if self.fresh else 'touched'} parameters"


@dataclass
class Result:
    """The times of one contender.

    Attributes:
        contender: the measured way of reading.
        nbytes: bytes that it reads in a round.
        seconds: of every round.
        verified: whether its bytes were equal to those of the files; None: its bytes were not compared.
        error: why there are no times; None: there are.
        how: the contender's description of how it read.
    """

    contender: Contender
    nbytes: int
    seconds: list[float] = field(default_factory=list)
    verified: bool | None = None
    error: str | None = None
    how: str = ""

    @property
    def rates(self) -> list[float]:
        """GB/s of every round."""
        return [self.nbytes / seconds / 1e9 for seconds in self.seconds]

    @property
    def median(self) -> float:
        """The median of the rates in GB/s; 0 if there are none."""
        return statistics.median(self.rates) if self.seconds else 0.0


@dataclass
class Measurement:
    """The results under one scenario, in the order of the contenders.

    Attributes:
        warnings: conditions that make the figures less reliable.
        others_share: the share of the machine's CPU time that other processes took during a run, the median.
    """

    scenario: Scenario
    rounds: int
    results: list[Result]
    warnings: list[str] = field(default_factory=list)
    others_share: float = 0.0

    @property
    def limit(self) -> Result | None:
        """The fastest of the plain reads."""
        plain = [result for result in self.results if result.contender.kind == "plain" and result.seconds]
        return max(plain, key=lambda result: result.median, default=None)

    def of_limit(self, result: Result) -> float | None:
        """A result's median as a share of the limit's; None if one of them has no times."""
        limit = self.limit
        return result.median / limit.median if limit is not None and result.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """The measurement as values for JSON."""
        return {
            "scenario": {"title": self.scenario.title, "cold": self.scenario.cold, "fresh": self.scenario.fresh},
            "rounds": self.rounds,
            "limit": None if self.limit is None else self.limit.contender.name,
            "results": [self._result(result) for result in self.results],
            "warnings": self.warnings,
            "others_share": round(self.others_share, 3),
        }

    def _result(self, result: Result) -> dict[str, Any]:
        share = self.of_limit(result)
        return {
            "name": result.contender.name,
            "kind": result.contender.kind,
            "version": result.contender.version,
            "gb_per_s": [round(rate, 4) for rate in result.rates],
            "median_gb_per_s": round(result.median, 4) if result.seconds else None,
            "of_limit": None if share is None else round(share, 4),
            "verified": result.verified,
            "how": result.how,
            "error": result.error,
        }


class Benchmark:
    """Contenders that load one workload; each is verified before it is measured.

    Args:
        workload: what is loaded.
        contenders: the ways of reading to measure.
        progress: called before every run, with the name of the run.
        patience_s: the most seconds that every run waits for other processes of the machine to become idle.
    """

    def __init__(
        self, workload: Workload, contenders: Sequence[Contender], progress: Progress, *, patience_s: float = 0.0
    ) -> None:
        self._workload = workload
        self._contenders = contenders
        self._progress = progress
        self._patience_s = patience_s
        self._verified: dict[str, bool] = {}
        self._errors: dict[str, str] = {}

    def verify(self) -> None:
        """Let every contender load once into poisoned memory and compare all bytes. One that fails is not measured.

        Raises:
            EngineLoaderError: this package loaded wrong bytes, or could not load.
        """
        self._progress("checksums of the files")
        expected = self._workload.checksums()
        parameters = Parameters(self._workload.tensors)
        for contender in self._contenders:
            self._progress(f"verifying {contender.name}")
            parameters.poison()
            error = self._run(contender, parameters, Result(contender, self._workload.nbytes))
            if error is None and contender.fills:
                error = _difference(expected, parameters.checksums())
                self._verified[contender.name] = error is None
            if error is not None:
                self._errors[contender.name] = error

    def measure(self, scenario: Scenario, rounds: int, contenders: Sequence[Contender] | None = None) -> Measurement:
        """Run all contenders, or these of them, ``rounds`` times in turns; those that failed ``verify`` are skipped."""
        contenders = self._contenders if contenders is None else contenders
        results = {contender.name: self._blank(contender) for contender in contenders}
        measurement = Measurement(scenario, rounds, list(results.values()))
        if not scenario.remote:
            page_cache.warm(self._workload.files)
        touched = None if scenario.fresh else Parameters(self._workload.tensors)
        if touched is not None:
            touched.poison()
        others: list[float] = []
        for contender in _turns(contenders, rounds):
            self._progress(f"{scenario.title}: {contender.name}")
            result = results[contender.name]
            if result.error is None:
                gc.collect()
                _wait_for_quiet(self._patience_s)
                self._prepare(scenario, measurement)
                before = cpu_time()
                result.error = self._run(contender, touched or Parameters(self._workload.tensors), result)
                others.append(cpu_time().others_share_since(before))
        measurement.others_share = statistics.median(others) if others else 0.0
        if measurement.others_share > _MUCH_OF_THE_MACHINE:
            measurement.warnings.append(
                f"other processes took {measurement.others_share:.0%} of the CPUs during the runs: "
                "measure when the machine is idle"
            )
        return measurement

    def _blank(self, contender: Contender) -> Result:
        error, verified = self._errors.get(contender.name), self._verified.get(contender.name)
        return Result(contender, self._workload.nbytes, verified=verified, error=error)

    def _prepare(self, scenario: Scenario, measurement: Measurement) -> None:
        if scenario.fresh:
            back_free_memory(self._workload.nbytes)
        if not scenario.cold:
            return
        page_cache.drop(self._workload.files)
        share = page_cache.resident_share(self._workload.files)
        if share > _RESIDENT_SHARE and not measurement.warnings:  # warn once
            measurement.warnings.append(
                f"{share:.0%} of the files stayed in the page cache, so these are not cold reads: "
                "is this a tmpfs, or has a process mapped the files?"
            )

    def _run(self, contender: Contender, parameters: Parameters, result: Result) -> str | None:
        """Time one load. Returns the reason if a peer failed; errors of this package are raised."""
        began = time.perf_counter()
        try:
            how = contender.load(self._workload, parameters.tensors)
        except EngineLoaderError:
            raise
        except Exception as error:
            if contender.kind == "ours":
                raise
            return f"{type(error).__name__}: {error}".splitlines()[0]
        result.seconds.append(time.perf_counter() - began)
        result.how = how or ""
        return None


def back_free_memory(nbytes: int) -> None:
    """Allocate and touch this much memory, in huge pages if there are some, and free it.

    The host of a virtual machine can take free pages away (free page reporting). The first process that touches such a
    page waits much longer for it. After this call, the guest has the pages, so all contenders wait equally long.
    """
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        for offset in range(0, nbytes, mmap.PAGESIZE):
            memory[offset] = 1


def _wait_for_quiet(patience_s: float) -> None:
    end = time.monotonic() + patience_s
    share = 1.0
    while share > _MUCH_OF_THE_MACHINE and time.monotonic() < end:
        before = cpu_time()
        time.sleep(_LOOK_S)
        share = cpu_time().others_share_since(before)


def _turns(contenders: Sequence[Contender], rounds: int) -> Iterator[Contender]:
    """Every contender once a round; each round begins with the next contender."""
    for number in range(rounds):
        first = number % max(1, len(contenders))
        yield from contenders[first:]
        yield from contenders[:first]


def _difference(expected: Mapping[str, int], got: Mapping[str, int]) -> str | None:
    wrong = [name for name, checksum in expected.items() if got[name] != checksum]
    return f"wrong bytes in {len(wrong)} of {len(expected)} tensors, e.g. {wrong[0]}" if wrong else None


def check_size(workload: Workload) -> str | None:
    """A warning if reading the files takes no longer than opening them and starting threads; None if it does."""
    if workload.nbytes >= _FEWEST_BYTES:
        return None
    return (
        f"{human_bytes(workload.nbytes)} are too few to measure: opening the files and starting threads takes about as "
        f"long as reading; measure a checkpoint of {human_bytes(_FEWEST_BYTES)} or more"
    )


def count_runs(contenders: Sequence[Contender], rounds: int) -> int:
    """How often a benchmark of these contenders calls its ``progress``."""
    return 1 + len(contenders) * (1 + rounds)


def memory_needed(workload: Workload) -> int:
    """The most bytes that a benchmark allocates: the parameters, and the largest file twice (some peers need that)."""
    largest = max(sum(info.nbytes for info in workload.tensors if info.file == file) for file in workload.files)
    return workload.nbytes + 2 * largest


def check_memory(workload: Workload, available: int) -> str | None:
    """A warning if the page cache cannot hold the files beside the benchmark's memory; None if it can.

    Raises:
        EngineLoaderError: there is not enough memory for the benchmark.
    """
    needed = memory_needed(workload)
    if needed > available:
        raise EngineLoaderError(
            f"this needs up to {human_bytes(needed)} of memory, {human_bytes(available)} are available: "
            "measure fewer files with --files"
        )
    if needed + workload.nbytes > available:
        return (
            f"the files do not fit into the page cache beside their parameters ({human_bytes(available)} available): "
            "warm reads will partly be cold"
        )
    return None
