"""Huge pages are asked for where tensors have memory, and nothing else happens."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine_loader import ask_for_huge_pages
from engine_loader.transfer.memory import huge_pages
from tests.support.mappings import need_huge_pages, vm_flags

MIB = 1 << 20


def test_memory_of_parameters_gets_huge_pages() -> None:
    need_huge_pages()
    model = torch.nn.Linear(4096, 2048, bias=False)
    expected = model.weight.detach().clone()
    ask_for_huge_pages(model.parameters())
    assert "hg" in vm_flags(model.weight.data_ptr() + 8 * MIB)
    assert torch.equal(model.weight, expected)


@pytest.mark.parametrize(("huge_ns", "advised"), [(12_000_000, False), (200_000, True)])
def test_pages_that_take_longer_than_small_ones_are_not_asked_for(
    huge_ns: int, advised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_huge_pages()
    times = {mmap.MADV_HUGEPAGE: huge_ns, mmap.MADV_NOHUGEPAGE: 600_000}
    monkeypatch.setattr(huge_pages, "_time_to_make", lambda _, advice: times[advice])
    tensor = torch.empty(128 * MIB, dtype=torch.uint8)
    ask_for_huge_pages([tensor])
    assert ("hg" in vm_flags(tensor.data_ptr() + 100 * MIB)) is advised
    huge_pages.advise_huge_pages([tensor])
    assert "hg" in vm_flags(tensor.data_ptr() + 100 * MIB)


def test_the_trial_makes_a_few_pages_and_changes_no_contents() -> None:
    need_huge_pages()
    fresh, filled = torch.empty(128 * MIB, dtype=torch.uint8), torch.full((128 * MIB,), 7, dtype=torch.uint8)
    before = resident_bytes()
    ask_for_huge_pages([fresh])
    ask_for_huge_pages([filled])
    assert resident_bytes() - before < 32 * MIB
    assert torch.equal(filled, torch.full_like(filled, 7)) and not fresh.any()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_other_memory_is_left_alone() -> None:
    need_huge_pages()
    # Too little for a trial, whose outcome is the host's.
    asked, other = torch.empty(48 * MIB, dtype=torch.uint8), torch.empty(48 * MIB, dtype=torch.uint8)
    ask_for_huge_pages([asked])
    assert "hg" in vm_flags(asked.data_ptr() + 32 * MIB)
    assert "hg" not in vm_flags(other.data_ptr() + 32 * MIB)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(0),
        torch.empty(1 << 30, device="meta"),
        torch.eye(3).to_sparse(),
        torch.tensor(3.0),
        torch.empty(5, 7).t()[1:3],
    ],
    ids=["empty", "meta", "sparse", "scalar", "view"],
)
def test_any_tensor_is_taken(tensor: torch.Tensor) -> None:
    ask_for_huge_pages([tensor, tensor])


def test_importing_it_by_the_package_needs_no_torch_before_it_is_used() -> None:
    code = "import engine_loader, sys; assert 'torch' not in sys.modules; print(engine_loader.ask_for_huge_pages)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ask_for_huge_pages" in done.stdout
