"""benchmarks/cuda.py without a GPU: other loaders in processes of their own, and what is said of those that fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import cuda
from engine_loader.bench.workload import Workload

CPU = torch.device("cpu")


@pytest.fixture
def workload(tmp_path: Path) -> Workload:
    tensors = {"a": torch.randn(300, 200), "b": torch.arange(1000), "scale": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    return Workload.of(tmp_path)


@pytest.mark.slow
def test_a_peer_is_verified_and_measured_in_its_process(workload: Workload) -> None:
    checksums = workload.checksums()
    with cuda.Apart("safetensors", workload, CPU, 240.0) as apart:
        apart.verify(checksums)
        figures = apart.run()
        assert 0 < figures.reading_seconds <= figures.seconds
        with pytest.raises(RuntimeError, match=r"ValueError: wrong bytes in 1 tensors, e\.g\. a"):
            apart.verify({**checksums, "a": 0})


def test_a_peer_that_does_not_end_is_stopped(workload: Workload) -> None:
    with cuda.Apart("safetensors", workload, CPU, 0.0) as apart:
        with pytest.raises(TimeoutError, match="no end within 0 s: stopped"):
            apart.run()
        with pytest.raises(RuntimeError, match="its process ended with status -9"):
            apart.run()


def test_what_failed_has_a_row_that_says_why(workload: Workload) -> None:
    parameters = cuda._Parameters(workload, CPU)
    limits, (ours, _) = cuda._limits(CPU), cuda.contenders.ours()
    entries = [cuda.Entry(one, cuda.Here(one, workload, parameters)) for one in [*limits, ours]]
    entries.append(cuda.Entry(ours, entries[-1].runner, error="no end within 5 s: stopped"))
    cuda._verify(workload, entries[:3])
    cuda._measure(workload, entries, 1, cold=False)
    table = cuda._table("cache", entries, workload.nbytes).splitlines()
    assert table[0] == "From cache:" and len(table) == 2 + 2 + 4
    assert all(row.count("|") == 8 for row in table[2:])
    assert table[-1] == "| engine_loader load_into | no end within 5 s: stopped | | | | | |"
