"""Direct mode: whatever a loader does with a weight, the model ends up as with real tensors."""

import copy
import io
import pickle
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from engine_loader.loading.direct.load import DirectLoad
from engine_loader.loading.direct.recording import RecordingTensor
from engine_loader.loading.weights import stream_weights
from engine_loader.settings import load_settings
from tests.loading.direct.model import COLUMNS, ROWS, Load, Model, after, same


def load_plain(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.data.copy_(weights["a"])


def load_fused(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for number, name in enumerate("ab"):
        model.fused.data.narrow(0, number * ROWS, ROWS).copy_(weights[name])


def load_half_of_the_columns(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.columns.copy_(weights["a"].narrow(1, COLUMNS // 2, COLUMNS // 2))


def load_half_of_the_rows(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight[: ROWS // 2].copy_(weights["a"].chunk(2)[1])
    model.weight[ROWS // 2 :] = weights["b"][: ROWS // 2]


def load_turned(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.turned.copy_(weights["a"].t())
    model.weight.copy_(weights["turned"].transpose(0, 1))


def load_interleaved(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.fused.view(ROWS, 2, COLUMNS)[:, 0].copy_(weights["a"])
    model.fused.view(ROWS, 2, COLUMNS)[:, 1].copy_(weights["b"])


def load_by_reshaping(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(weights["turned"].reshape(ROWS, COLUMNS))
    model.turned.copy_(weights["a"].view(ROWS, COLUMNS // 8, 8).permute(1, 2, 0).reshape(COLUMNS, ROWS))


def load_by_concatenating(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.fused.copy_(torch.cat([weights["a"], weights["b"]]))


def load_with_arithmetic(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(weights["a"] * weights["scale"] + 1)


def load_after_writing_into_the_weight(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(weights["a"])
    weights["a"][0].zero_()
    weights["a"].narrow(1, 0, 2).mul_(2)
    model.low.copy_(weights["a"])


def load_into_another_type(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.low.copy_(weights["a"])
    model.weight.copy_(weights["b"].to(torch.bfloat16))


def load_a_row_everywhere(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(weights["a"][3])


def load_by_item_and_comparison(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.fill_(weights["scale"].item() + weights["a"][2, 3].item() + float(weights["b"].max()))
    if bool((weights["a"] > 0).any()) and not torch.equal(weights["a"], weights["b"]):
        model.low.fill_(1)


def load_by_numpy_and_lists(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(torch.from_numpy(weights["a"].numpy().copy()))
    model.low[0].copy_(torch.tensor(weights["b"][0].tolist()))


def load_by_pickle_and_deepcopy(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(pickle.loads(pickle.dumps(weights["a"])))
    model.low.copy_(copy.deepcopy(weights["b"]))
    stream = io.BytesIO()
    torch.save(weights["turned"], stream)
    stream.seek(0)
    model.turned.copy_(torch.load(stream))


def load_by_replacing_the_data(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(weights["b"])
    model.weight.data = weights["a"]


def load_by_replacing_the_parameter(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight = nn.Parameter(weights["a"], requires_grad=False)
    model.register_buffer("extra", weights["b"])


def load_twice(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(weights["a"])
    model.weight.copy_(weights["b"])
    model.columns.copy_(weights["a"][:, : COLUMNS // 2])
    model.columns[:, 3:50].copy_(weights["b"][:, 3:50])


def load_and_overwrite_with_values(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(weights["a"])
    model.weight[5:].fill_(7)
    model.fused[:ROWS].copy_(weights["a"])
    model.fused[ROWS:].fill_(0)


def load_and_read_the_parameter(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(weights["a"])
    model.low.fill_(model.weight.sum().item())
    model.fused[:ROWS].copy_(weights["b"])
    model.fused[ROWS:] = torch.from_numpy(model.fused.data.numpy()[:ROWS] * 2)


def load_from_another_parameter(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(weights["a"])
    model.low.copy_(model.weight)
    model.turned.copy_(model.weight.t())


def load_and_resize(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(weights["a"])
    model.weight.data.resize_(2 * ROWS, COLUMNS)
    model.weight.data[ROWS:] = 0


def load_and_keep(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.kept += [weights["a"], weights["b"][2:5], weights["scale"]]


def load_conditionally(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    mask = weights["a"] > 0
    model.weight.copy_(torch.where(mask, weights["a"], weights["b"]))
    model.low[mask] = 1
    model.low[~mask] = 2


def load_with_another_view_of_the_type(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.view(torch.int32).copy_(weights["a"].view(torch.int32))
    model.low.view(torch.uint8).copy_(weights["b"].view(torch.uint8)[:, : 2 * COLUMNS])
    model.fused[:4].copy_(weights["b"].view(torch.int16)[3:7, ::2])
    model.turned.copy_(weights["turned"].view(torch.int32)[:8].view(torch.float32)[0, 0])


def load_foreach(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(weights["b"])
    torch._foreach_copy_([model.weight, model.turned], [weights["a"], weights["turned"]])
    torch._foreach_add_([model.weight], [weights["b"]])


def load_into_out(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(weights["b"])
    torch.mul(weights["a"], 2, out=model.weight)
    torch.add(torch.ones(ROWS, COLUMNS), 1, out=weights["b"])
    model.low.copy_(weights["b"])


def load_by_turning_in_place(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    weights["a"].t_()
    model.turned.copy_(weights["a"])
    weights["b"].unsqueeze_(0)
    model.weight.copy_(weights["b"][0])
    weights["scale"].resize_(1)
    model.low.fill_(weights["scale"][0].item())


def load_by_setting_memory(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(weights["b"])
    model.weight.set_(weights["a"])
    model.columns.set_(weights["b"][:, : COLUMNS // 2])
    weights["b"].zero_()


def load_by_swapping_parameters(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    other = nn.Parameter(torch.full((ROWS, COLUMNS), float("nan")), requires_grad=False)
    model.weight.copy_(weights["a"])
    torch.utils.swap_tensors(model.weight, other)
    other.copy_(weights["b"])
    model.low.copy_(other)
    del other
    model.weight.copy_(weights["b"])


def load_through_memory_that_was_exposed(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    array = model.weight.detach().numpy()
    model.weight.copy_(weights["a"])
    model.low.fill_(float(array.sum()))
    weight = weights["b"].numpy()
    weight[:] = 5
    model.fused[:ROWS].copy_(weights["b"])


def load_a_weight_from_a_parameter(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(weights["a"])
    weights["b"].copy_(model.weight)
    model.fused[ROWS:].copy_(weights["b"])


def load_by_scattering(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    rows = torch.arange(ROWS - 1, -1, -1)
    model.weight[rows] = weights["a"]
    model.fused.index_copy_(0, rows, weights["b"])
    model.turned[:, 3] = weights["turned"][:, 4]
    model.turned[torch.arange(COLUMNS) % 2 == 0] = weights["turned"][: COLUMNS // 2]


def load_without_waiting(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight.copy_(weights["a"], non_blocking=True)
    model.low.copy_(weights["b"], non_blocking=True)


def load_nothing_at_all(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight[:0].copy_(weights["a"][:0])
    model.weight[:, 5:5].copy_(weights["a"][:, 7:7])
    model.register_buffer("empty", weights["a"][3:3].clone())


def load_tied(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    tied = model.weight.data.view(ROWS, COLUMNS)
    model.weight.copy_(weights["a"])
    tied[10:20].copy_(weights["b"][10:20])
    model.weight[15].copy_(weights["a"][0])
    model.head = nn.Parameter(weights["b"], requires_grad=False)
    model.tail = model.head
    model.tail.data.mul_(2)


def load_into_overlapping_columns(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for begin in range(0, COLUMNS - 40, 25):
        model.weight[:, begin : begin + 40].copy_(weights["ab"[begin % 2]][:, :40])
        model.weight[begin % 7 :: 7].copy_(weights["a"][begin % 7 :: 7])


def load_from_threads(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    def work(name: str, target: torch.Tensor) -> None:
        with torch.no_grad():
            target.copy_(weights[name])
            target.add_(1)

    threads = [
        threading.Thread(target=work, args=(name, model.fused[number * ROWS : (number + 1) * ROWS]))
        for number, name in enumerate("ab")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def load_by_state_dict(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.load_state_dict({"weight": weights["a"], "turned": weights["turned"]}, strict=False)
    model.load_state_dict({"fused": torch.cat([weights["b"]] * 2), "low": weights["b"]}, strict=False, assign=True)


def load_by_tensors_of_lists(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    first = [weights["a"][0, 0], weights["b"][0, 0]]
    model.weight[0, :2].copy_(torch.tensor(first))
    model.weight[1, :2].copy_(torch.stack(first))
    model.weight[2].copy_(torch.as_tensor(weights["a"][5]))
    weights["turned"].apply_(abs)
    model.turned.copy_(weights["turned"])


def load_into_views_of_views(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for part, (row, column) in enumerate([(0, 0), (0, 80), (48, 0), (48, 80)]):
        view = weights["a"].unflatten(0, (2, 48))[row // 48].unflatten(1, (2, 80))[:, column // 80]
        model.fused.unflatten(0, (4, 48))[part][:, :80].copy_(view)
    for chunk, tensor in zip(model.weight.tensor_split(3, dim=1), weights["b"].tensor_split(3, dim=1), strict=True):
        chunk.copy_(tensor)


def load_a_changed_parameter(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    model.weight = nn.Parameter(weights["a"], requires_grad=False)
    model.weight.marked = True
    model.weight.data = model.weight.data.t()
    model.weight.data[0] = 0
    model.low = nn.Parameter(weights["b"].narrow(0, 3, 5), requires_grad=False)
    model.low.copy_(weights["a"][:5])


def load_in_inference_mode(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    with torch.inference_mode():
        model.weight.copy_(weights["a"])
        model.low.copy_(model.weight.t().reshape(ROWS, COLUMNS))
        model.turned.copy_(weights["turned"].t().reshape(COLUMNS, ROWS))
        model.columns.copy_(weights["b"].chunk(2, dim=1)[1])


LOADS = [value for name, value in sorted(globals().items()) if name.startswith("load_") and name != "load_settings"]


@pytest.mark.parametrize("engine", ["auto", "python"])
@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.__name__.removeprefix("load_"))
def test_the_model_is_as_with_real_tensors(load: Load, engine: str, checkpoint: Path) -> None:
    same(after(load, checkpoint, direct=False), after(load, checkpoint, direct=True, engine=engine))


def test_plain_copies_and_slices_read_nothing_before_they_are_planned(checkpoint: Path) -> None:
    for load in (load_plain, load_fused, load_half_of_the_columns, load_half_of_the_rows, load_interleaved, load_twice):
        model = Model()
        with DirectLoad(model) as session, torch.no_grad():
            load(model, dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session)))
        assert session.materialised == {}, load.__name__


def test_only_what_is_kept_is_counted(checkpoint: Path) -> None:
    model, lines = Model(), []
    with DirectLoad(model) as session, torch.no_grad():
        weights = stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session, tell=lines.append)
        load_half_of_the_columns(model, dict(weights))
    assert session.recorded_bytes == ROWS * COLUMNS // 2 * 4
    assert "30.0 KiB of 180.0 KiB" in lines[0]


def test_the_parameters_are_complete_when_the_load_ends_and_not_only_then(checkpoint: Path) -> None:
    model = Model()
    with DirectLoad(model) as session, torch.no_grad():
        weights = dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session))
        model.weight.copy_(weights["a"])
        assert bool(torch.isfinite(model.weight).all())


def test_when_most_must_be_read_first_the_rest_is_streamed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_loader.loading.direct.load._MATERIALISED_GRACE_BYTES", 1000)
    lines: list[str] = []
    model, kinds = Model(), {}
    with DirectLoad(model) as session, torch.no_grad():
        settings = load_settings().settings.loader
        for name, weight in stream_weights([str(checkpoint)], settings, direct=session, tell=lines.append):
            kinds[name] = type(weight)
            if name in ("a", "b"):
                model.weight.copy_(weight * 2)
    assert RecordingTensor in kinds.values()
    assert list(kinds.values())[-1] is torch.Tensor
    assert "streamed in the end" in lines[0]


def test_without_no_grad(checkpoint: Path) -> None:
    expected = after(load_fused, checkpoint, direct=False)
    model = Model()
    with DirectLoad(model) as session:
        load_fused(model, dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session)))
    assert torch.equal(model.fused, expected["fused"])
    leaf = nn.Parameter(torch.zeros(ROWS, COLUMNS))
    with DirectLoad(model) as session:
        weights = dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session))
        with pytest.raises(RuntimeError, match="leaf"):
            leaf.copy_(weights["a"])


def test_memory_that_overlaps_itself_is_refused_as_by_torch(checkpoint: Path) -> None:
    model = Model()
    with DirectLoad(model) as session, torch.no_grad():
        weights = dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session))
        with pytest.raises(RuntimeError, match="single memory location"):
            torch.zeros(COLUMNS).expand(ROWS, COLUMNS).copy_(weights["a"])


def test_a_subclass_of_tensor_that_keeps_its_data_elsewhere_gets_data(checkpoint: Path) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = Model()
    with DirectLoad(model) as session, torch.no_grad():
        weights = dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session))
        pair = TwoTensor(torch.zeros(ROWS, COLUMNS), torch.zeros(ROWS, COLUMNS))
        pair.a.copy_(weights["b"])
        pair.copy_(weights["a"])
        expected = weights["a"] + 0
    assert torch.equal(pair.a, expected)
    assert torch.equal(pair.b, expected)
