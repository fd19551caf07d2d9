"""The machinery behind ``bench read`` and benchmarks/read.py: a figure is only as good as what was measured."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine_loader import CheckpointError
from engine_loader.bench import contenders, page_cache, plain_reads, rounds
from engine_loader.bench.contenders import Contender
from engine_loader.bench.rounds import Benchmark, Measurement, Result, Scenario, count_runs
from engine_loader.bench.workload import Parameters, Workload
from engine_loader.formats.safetensors import TensorInfo
from engine_loader.machine import CpuTime
from tests.support.checkpoints import checkpoint, entry, tensor_bytes

ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 1 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Tensors that are longer than a read, shorter, empty, scalar, and of a type smaller than a byte."""
    tensors = {
        "long": entry("BF16", [9, MIB]),
        "short": entry("F32", [7], seed=1),
        "empty": entry("I64", [0, 3]),
        "scalar": entry("F64", [], seed=2),
        "packed": entry("F4", [3, 8], seed=3),
    }
    (tmp_path / "a.safetensors").write_bytes(checkpoint(tensors, padding=1))
    (tmp_path / "b.safetensors").write_bytes(checkpoint({"other": entry("U8", [3 * MIB], seed=4)}))
    return tmp_path


class TestParameters:
    def test_they_have_the_checkpoints_types_and_shapes_and_lie_as_torchs_own_do(self, model: Path) -> None:
        workload = Workload.of(model)
        tensors = Parameters(workload.tensors).tensors
        assert tensors["long"].dtype == torch.bfloat16 and tuple(tensors["long"].shape) == (9, MIB)
        assert tuple(tensors["packed"].shape) == (3, 4)
        assert tensors["empty"].numel() == 0 and tensors["scalar"].dim() == 0
        assert tensors["long"].data_ptr() % mmap.PAGESIZE == torch.empty(64 * MIB).data_ptr() % mmap.PAGESIZE

    def test_fresh_ones_take_no_memory_before_they_are_written_to(self) -> None:
        def resident() -> int:
            return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

        before = resident()
        parameters = Parameters([TensorInfo("x", "U8", (256 * MIB,), "/nowhere", 0, 256 * MIB)])
        assert resident() - before < 32 * MIB
        parameters.poison()
        assert resident() - before > 200 * MIB


class TestPlainReads:
    @pytest.mark.parametrize("threads", [1, 3])
    def test_they_fill_every_parameter_bit_for_bit(self, threads: int, model: Path) -> None:
        workload = Workload.of(model)
        parameters = Parameters(workload.tensors)
        parameters.poison()
        plain_reads.read_plainly(workload, parameters.tensors, threads)
        assert parameters.checksums() == workload.checksums()
        for info in workload.tensors:
            content = Path(info.file).read_bytes()[info.offset : info.offset + info.nbytes]
            assert tensor_bytes(parameters.tensors[info.name]) == content

    def test_short_reads_are_resumed(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:300_001]], offset))
        workload = Workload.of(model)
        parameters = Parameters(workload.tensors)
        plain_reads.read_plainly(workload, parameters.tensors, 2)
        assert parameters.checksums() == workload.checksums()

    def test_a_file_that_was_cut_meanwhile_is_an_error_not_a_hang(self, model: Path) -> None:
        workload = Workload.of(model)
        parameters = Parameters(workload.tensors)
        os.truncate(model / "b.safetensors", MIB)
        with pytest.raises(CheckpointError, match="the file ended here"):
            plain_reads.read_plainly(workload, parameters.tensors, 2)


class TestVerification:
    def test_a_contender_that_does_nothing_is_found_out(self, model: Path) -> None:
        def nothing(workload: Workload, targets: contenders.Targets) -> None:
            return

        workload = Workload.of(model)
        contender = Contender("idle", "peer", nothing)
        benchmark = Benchmark(workload, [contender], lambda step: None)
        benchmark.verify()
        (result,) = benchmark.measure(Scenario(), 2).results
        assert result.error is not None and result.error.startswith("wrong bytes in 5 of 6 tensors")
        assert result.seconds == []

    @pytest.mark.slow
    def test_every_installed_loader_loads_the_right_bytes(self, model: Path) -> None:
        chosen = [
            contenders.plain(2),
            contenders.plain(2, huge_pages=True),
            *contenders.ours(),
            contenders.ours_with_huge_pages(),
            *contenders.installed_peers(),
        ]
        # Peers do not take types smaller than a byte.
        (model / "a.safetensors").write_bytes(checkpoint({"x": entry("BF16", [300, 200]), "y": entry("F32", [5])}))
        steps: list[str] = []
        benchmark = Benchmark(Workload.of(model), chosen, steps.append)
        benchmark.verify()
        measurement = benchmark.measure(Scenario(fresh=True), 3)
        for result in measurement.results:
            assert (result.error, result.verified, len(result.seconds)) == (None, True, 3), result
        assert len(steps) == count_runs(chosen, 3)


class TestRounds:
    @pytest.mark.slow
    def test_contenders_take_turns_and_every_round_begins_with_another(self, model: Path) -> None:
        order: list[str] = []

        def contender(name: str) -> Contender:
            return Contender(name, "plain", lambda workload, targets: order.append(name), fills=False)

        benchmark = Benchmark(Workload.of(model), [contender("a"), contender("b"), contender("c")], lambda step: None)
        benchmark.measure(Scenario(), 3)
        assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]

    def test_a_busy_machine_is_waited_for_only_as_long_as_patience_lasts(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looks: list[float] = []

        def sleep(seconds: float) -> None:
            looks.append(seconds)

        busy = iter(range(1000))
        monkeypatch.setattr(rounds.time, "sleep", sleep)
        monkeypatch.setattr(rounds, "cpu_time", lambda: CpuTime(*([float(next(busy))] * 2), own=0.0))
        contender = Contender("a", "plain", lambda workload, targets: None, fills=False)
        patient = Benchmark(Workload.of(model), [contender], lambda step: None, patience_s=0.001)
        (warning,) = patient.measure(Scenario(), 1).warnings
        assert looks
        assert warning == "other processes took 100% of the CPUs during the runs: measure when the machine is idle"
        looks.clear()
        Benchmark(Workload.of(model), [contender], lambda step: None).measure(Scenario(), 1)
        assert looks == []

    def test_medians_and_shares(self) -> None:
        def result(name: str, kind: str, *seconds: float) -> Result:
            return Result(Contender(name, kind, lambda *_: None), 10**9, list(seconds))  # type: ignore[arg-type, return-value]

        slow, fast, ours = result("1", "plain", 1, 2, 4), result("2", "plain", 0.5), result("o", "ours", 1, 1, 100)
        measurement = Measurement(Scenario(), 3, [slow, fast, ours])
        assert slow.median == 0.5
        assert measurement.limit is fast
        assert measurement.of_limit(ours) == 0.5
        failed = Result(ours.contender, 10**9, error="no")
        assert measurement.of_limit(failed) is None
        assert Measurement(Scenario(), 3, [failed]).limit is None


class TestPageCache:
    def test_what_was_dropped_is_gone_and_what_was_read_is_there(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_bytes(os.urandom(8 * MIB))
        paths = [str(file)]
        page_cache.drop(paths)
        if page_cache.resident_share(paths) > 0:
            pytest.skip("this file system's pages cannot be dropped")
        page_cache.warm(paths)
        assert page_cache.resident_share(paths) == 1.0


@pytest.mark.slow
def test_the_benchmark_makes_its_checkpoint_once_and_prints_markdown(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "benchmarks/read.py",
        "--dir",
        str(tmp_path),
        "--gib",
        "0.03",
        "--files",
        "2",
        "--rounds",
        "1",
    ]
    made = []
    for scenarios in (["warm", "fresh", "cold"], ["warm"]):
        done = subprocess.run(
            [*command, "--scenarios", *scenarios], cwd=ROOT, capture_output=True, text=True, check=True
        )
        made.append({file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")})
        for title in scenarios:
            heading = {"warm": "Warm page cache, into touched", "fresh": "into fresh", "cold": "Cold page cache"}[title]
            assert heading in done.stdout
        assert "| preadv, 16 threads |" in done.stdout
        assert "| engine_loader load_into |" in done.stdout
        assert ("dd iflag=direct" in done.stdout) is ("cold" in scenarios)
    assert len(made[0]) == 2
    assert made[0] == made[1]
