"""Huge pages are asked for where tensors have memory, and nothing else happens."""

import subprocess
import sys

import pytest
import torch

from engine_loader import ask_for_huge_pages
from tests.support.mappings import need_huge_pages, vm_flags

MIB = 1 << 20


def test_memory_of_parameters_gets_huge_pages() -> None:
    need_huge_pages()
    model = torch.nn.Linear(4096, 2048, bias=False)
    expected = model.weight.detach().clone()
    ask_for_huge_pages(model.parameters())
    assert "hg" in vm_flags(model.weight.data_ptr() + 8 * MIB)
    assert torch.equal(model.weight, expected)


def test_other_memory_is_left_alone() -> None:
    need_huge_pages()
    asked, other = torch.empty(64 * MIB, dtype=torch.uint8), torch.empty(64 * MIB, dtype=torch.uint8)
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
