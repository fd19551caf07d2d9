"""load_into: straight into existing memory, and only where the tensor fits."""

import pytest
import torch

from engine_loader import CheckpointError, open_checkpoint
from engine_loader.formats.dtypes import DTYPE_BITS
from engine_loader.report.load_report import LoadReport
from tests.support.checkpoints import checkpoint, entry, tensor_bytes

W, V = entry("F32", [6, 8], 1), entry("BF16", [5000, 7], 2)


def value(tensor: tuple[str, list[int], bytes]) -> torch.Tensor:
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[tensor[0]]
    return torch.frombuffer(bytearray(tensor[2]), dtype=dtype).view(*tensor[1])


@pytest.fixture
def opened(tmp_path, way):
    (tmp_path / "w").write_bytes(checkpoint({"odd": entry("U8", [3]), "w": W, "v": V, "e": ("F32", [0, 4], b"")}))
    with open_checkpoint(tmp_path / "w", **way) as found:
        yield found


def same(target: torch.Tensor, source: tuple[str, list[int], bytes]) -> None:
    assert tensor_bytes(target) == source[2]


def test_bytes_arrive_in_the_given_memory(opened):
    targets = {"v": torch.zeros(5000, 7, dtype=torch.bfloat16), "w": torch.zeros(6, 8), "e": torch.empty(0, 4)}
    addresses = {name: target.data_ptr() for name, target in targets.items()}
    opened.load_into(targets)
    same(targets["w"], W)
    same(targets["v"], V)
    assert {name: target.data_ptr() for name, target in targets.items()} == addresses


def test_only_what_is_asked_for_is_read(opened):
    report = LoadReport()
    opened.load_into({"w": torch.zeros(6, 8)}, report=report)
    assert (report.tensors, report.bytes_loaded) == (1, 6 * 8 * 4)


def test_parameters_that_require_gradients_are_filled(opened):
    module = torch.nn.Linear(8, 6, bias=False)
    opened.load_into({"w": module.weight})
    same(module.weight, W)
    assert module.weight.requires_grad
    assert module.weight.grad_fn is None


@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(8, 6).t(),
        torch.zeros(6, 16)[:, 3:11],
        torch.zeros(6, 16)[:, ::2],
        torch.zeros(12, 8)[1::2],
        torch.zeros(8, 3, 6).permute(2, 1, 0)[:, 1],
        torch.zeros(100)[10:58].view(6, 8),
    ],
    ids=["transposed", "columns", "every-second-column", "every-second-row", "permuted", "inside"],
)
def test_strided_targets_are_filled_and_nothing_beside_them(opened, target):
    base = target._base if target._base is not None else target
    base.fill_(-7)
    opened.load_into({"w": target})
    same(target, W)
    assert int((base == -7).sum()) == base.numel() - target.numel()


def test_interleaved_targets_are_no_overlap(tmp_path):
    (tmp_path / "w").write_bytes(checkpoint({"q": entry("F32", [6, 4], 1), "k": entry("F32", [6, 2], 2)}))
    fused = torch.zeros(6, 6)
    with open_checkpoint(tmp_path / "w") as opened:
        opened.load_into({"q": fused[:, :4], "k": fused[:, 4:]})
        assert torch.equal(fused, torch.cat([opened.get_tensor("q"), opened.get_tensor("k")], 1))


@pytest.mark.parametrize(
    "target",
    [torch.zeros(6, 8, dtype=torch.float64), torch.zeros(6, 8, dtype=torch.int32), torch.zeros(8, 6), torch.zeros(48)],
    ids=["float64", "int32", "transposed-shape", "flat"],
)
def test_another_type_or_shape_is_refused_and_both_are_named(opened, target):
    with pytest.raises(CheckpointError, match=r"w: 'w' is torch\.float32 \[6, 8\], the target is torch\.") as caught:
        opened.load_into({"w": target})
    assert str(list(target.shape)) in str(caught.value)
    assert not target.any()


def shared() -> dict[str, dict[str, torch.Tensor]]:
    memory = torch.zeros(200)
    return {
        "same": {"a": memory[:48].view(6, 8), "b": memory[:48].view(6, 8)},
        "partly": {"a": memory[:48].view(6, 8), "b": memory[47:95].view(6, 8)},
        "inside": {"a": memory[:96].view(6, 16)[:, :8], "b": memory[8:104].view(6, 16)[:, 7:15]},
        "transposed": {"a": memory[:48].view(8, 6).t(), "b": memory[:48].view(6, 8)},
        "interleaved": {"a": memory[:96].view(6, 16)[:, ::2], "b": memory[:96].view(6, 16)[:, 4:12]},
    }


@pytest.mark.parametrize("case", list(shared()))
def test_targets_that_overlap_are_named(tmp_path, case):
    (tmp_path / "w").write_bytes(checkpoint({"a": entry("F32", [6, 8], 1), "b": entry("F32", [6, 8], 2)}))
    targets = shared()[case]
    with open_checkpoint(tmp_path / "w") as opened:
        with pytest.raises(CheckpointError, match=r"the targets of '[ab]' and '[ab]' overlap in memory"):
            opened.load_into(targets)
        assert not targets["a"].any()


@pytest.mark.parametrize(
    "target",
    [torch.zeros(8).expand(6, 8), torch.zeros(6, 1).expand(6, 8), torch.zeros(20).as_strided([6, 8], [1, 1])],
    ids=["rows", "columns", "windows"],
)
def test_elements_that_share_memory_are_refused(opened, target):
    with pytest.raises(CheckpointError, match="elements of the target of 'w' share memory"):
        opened.load_into({"w": target})


def without_memory() -> torch.Tensor:
    tensor = torch.zeros(6, 8)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    "target",
    [torch.empty(6, 8, device="meta"), torch.zeros(6, 8).to_sparse(), without_memory()],
    ids=["meta", "sparse", "freed"],
)
def test_a_tensor_without_memory_is_refused(opened, target):
    with pytest.raises(CheckpointError, match="the target of 'w' has no memory to read into"):
        opened.load_into({"w": target})


def test_a_tensor_that_only_stands_for_another_is_refused(opened):
    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise AssertionError(function)

    target = torch.Tensor._make_wrapper_subclass(Wrapper, (6, 8), dtype=torch.float32)
    with pytest.raises(CheckpointError, match="no memory to read into"):
        opened.load_into({"w": target})


def test_a_conjugated_view_is_refused(tmp_path):
    (tmp_path / "w").write_bytes(checkpoint({"c": entry("C64", [4])}))
    with open_checkpoint(tmp_path / "w") as opened, pytest.raises(CheckpointError, match="no memory to read into"):
        opened.load_into({"c": torch.zeros(4, dtype=torch.complex64).conj()})


@pytest.mark.parametrize("dtype", list(DTYPE_BITS))
def test_every_type_can_be_filled(tmp_path, dtype):
    tensor = entry(dtype, [4, 8], 3)
    (tmp_path / "w").write_bytes(checkpoint({"odd": entry("U8", [1]), "t": tensor}))
    with open_checkpoint(tmp_path / "w") as opened:
        target = torch.empty_like(opened.get_tensor("t"))
        opened.load_into({"t": target})
    assert tensor_bytes(target) == tensor[2]


def test_shards_are_filled_in_one_call(tmp_path):
    tensors = {f"t{number}": entry("F32", [100, number], number) for number in range(1, 9)}
    for name, tensor in tensors.items():
        (tmp_path / f"{name}.safetensors").write_bytes(checkpoint({name: tensor}))
    with open_checkpoint(tmp_path) as opened:
        targets = {name: torch.zeros(100, shape[1]) for name, (_, shape, _) in tensors.items()}
        report = LoadReport()
        opened.load_into(targets, report=report)
    assert {name: tensor_bytes(target) for name, target in targets.items()} == {n: t[2] for n, t in tensors.items()}
    assert (report.files, report.tensors) == (8, 8)
