"""Direct mode: whatever a loader does with a weight, the model ends up as with real tensors."""

import contextlib
import copy
import gc
import io
import os
import pickle
import threading
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine_loader import CheckpointError, TransferError
from engine_loader.loading.direct.load import DirectLoad
from engine_loader.loading.direct.recording import RecordingTensor
from engine_loader.loading.files import open_files
from engine_loader.loading.find import SafetensorsFiles
from engine_loader.loading.safetensors_store import SafetensorsStore
from engine_loader.loading.weights import stream_weights
from engine_loader.settings import load_settings
from engine_loader.sources.posix import PosixSource
from tests.support.resources import left_open, open_resources

ROWS, COLUMNS = 96, 160
Weights = Iterator[tuple[str, torch.Tensor]]
Load = Callable[[nn.Module, dict[str, torch.Tensor]], object]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # All of it NaN: what a loader leaves out shows.
        self.weight = nn.Parameter(torch.full((ROWS, COLUMNS), float("nan")), requires_grad=False)
        self.fused = nn.Parameter(torch.full((2 * ROWS, COLUMNS), float("nan")), requires_grad=False)
        self.columns = nn.Parameter(torch.full((ROWS, COLUMNS // 2), float("nan")), requires_grad=False)
        self.turned = nn.Parameter(torch.full((COLUMNS, ROWS), float("nan")), requires_grad=False)
        self.low = nn.Parameter(torch.full((ROWS, COLUMNS), float("nan"), dtype=torch.bfloat16), requires_grad=False)
        self.kept: list[torch.Tensor] = []


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(ROWS, COLUMNS),
        "b": torch.randn(ROWS, COLUMNS),
        "scale": torch.tensor(3.0),
        "turned": torch.randn(COLUMNS, ROWS),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def after(load: Load, checkpoint: Path, *, direct: bool, **options: object) -> dict[str, torch.Tensor]:
    """What the model holds after a load, and that it holds nothing but real tensors."""
    model = Model()
    settings = load_settings(options).settings.loader
    if direct:
        with DirectLoad(model) as session, torch.no_grad():
            load(model, dict(stream_weights([str(checkpoint)], settings, direct=session)))
    else:
        with torch.no_grad():
            load(model, dict(stream_weights([str(checkpoint)], settings)))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state |= {f"kept.{number}": tensor for number, tensor in enumerate(model.kept)}
    assert not [name for name, tensor in state.items() if type(tensor) is RecordingTensor]
    return {name: tensor.detach().clone() for name, tensor in state.items()}


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


def load_through_memory_that_was_opened(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
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


def same(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor.nan_to_num(nan=-77.0), actual[name].nan_to_num(nan=-77.0)), name


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


def test_a_kept_weight_works_after_the_load_and_without_the_file(checkpoint: Path) -> None:
    model = Model()
    with DirectLoad(model) as session, torch.no_grad():
        weights = dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session))
        kept = weights["a"][1:]
        del weights
    checkpoint.unlink()
    expected = torch.empty(ROWS - 1, COLUMNS).copy_(kept)
    assert torch.equal(kept + 0, expected)
    assert bool(torch.isfinite(expected).all())


def test_an_error_names_the_tensor_and_nothing_is_left(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SafetensorsStore(
        open_files(PosixSource(), SafetensorsFiles((str(checkpoint),))), "posix", load_settings().settings.loader
    ) as reader:
        place = next(info.offset for info in reader.files.tensors if info.name == "b")
    before = open_resources()
    model = Model()
    with pytest.raises(TransferError, match=r"tensor 'b'"), DirectLoad(model) as session, torch.no_grad():
        weights = dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session))
        os.truncate(checkpoint, place + 100)
        model.weight.copy_(weights["b"])
    del weights, session
    gc.collect()
    assert left_open(before) == []


def test_an_error_of_the_engine_ends_the_load_and_gives_everything_back(checkpoint: Path) -> None:
    before = open_resources()
    model = Model()
    with pytest.raises(ZeroDivisionError), DirectLoad(model) as session, torch.no_grad():
        weights = dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session))
        model.weight.copy_(weights["a"])
        raise ZeroDivisionError
    assert left_open(before) == []


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


def test_parameters_that_are_recording_tensors_stay_the_same_objects_with_their_attributes(checkpoint: Path) -> None:
    model = Model()
    with DirectLoad(model) as session, torch.no_grad():
        weights = dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session))
        model.weight = nn.Parameter(weights.pop("a"), requires_grad=False)
        model.weight.loader = "kept"
        model.tied = [model.weight]
        del weights
    assert type(model.weight) is nn.Parameter
    assert model.weight.loader == "kept"
    assert model.tied[0] is model.weight
    assert model.weight.data_ptr() != 0


def test_weights_that_are_asked_for_after_the_load_are_an_error(checkpoint: Path) -> None:
    model = Model()
    with DirectLoad(model) as session, torch.no_grad():
        weights = stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session)
        next(weights)
    with pytest.raises(CheckpointError, match="after the load had ended"):
        next(weights)


def test_garbage_that_nobody_holds_is_not_read(checkpoint: Path) -> None:
    model = Model()
    with DirectLoad(model) as session, torch.no_grad():
        weights = dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session))
        cycle: list[object] = [weights.pop("a"), weights.pop("b"), weights.pop("turned")]
        cycle.append(cycle)
        del cycle, weights
    assert session.materialised == {}


def test_an_error_that_the_engines_code_passes_over_still_ends_the_load(checkpoint: Path) -> None:
    model = Model()
    with pytest.raises(TransferError, match="tensor '"), DirectLoad(model) as session, torch.no_grad():
        weights = dict(stream_weights([str(checkpoint)], load_settings().settings.loader, direct=session))
        os.truncate(checkpoint, 500)
        with contextlib.suppress(Exception):
            model.weight.copy_(weights["a"] * 2)
        with contextlib.suppress(Exception):
            model.fused[:ROWS].copy_(weights["b"])
            model.fused.sum()


def test_a_cut_at_any_tensor_is_an_error_and_never_a_half_filled_model(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.randn(70, 100) for number in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    with SafetensorsStore(
        open_files(PosixSource(), SafetensorsFiles((str(tmp_path / "model.safetensors"),))),
        "posix",
        load_settings().settings.loader,
    ) as reader:
        places = {info.name: info.offset for info in reader.files.tensors}
    for name, place in places.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        model = nn.ParameterDict({key: nn.Parameter(torch.full((70, 100), float("nan"))) for key in tensors})
        with pytest.raises(TransferError, match=f"tensor '{name}'"), DirectLoad(model) as session, torch.no_grad():
            weights = stream_weights([str(path)], load_settings().settings.loader, direct=session)
            for at, (key, weight) in enumerate(weights):
                if at == 0:
                    os.truncate(path, place + 5)
                model[key].copy_(weight)


# Steps of a loader: each takes a generator of random choices, the weights and the model's tensors, all of any shape.
Draw = Callable[[st.SearchStrategy[int]], int]


def _some_view(draw: st.DataObject, tensor: torch.Tensor) -> torch.Tensor:
    """A random view of a tensor; the same choices on every kind of tensor."""
    for _ in range(draw.draw(st.integers(0, 3))):
        kind = draw.draw(st.sampled_from(["narrow", "select", "t", "flatten", "step", "unsqueeze", "chunk", "type"]))
        dims = tensor.dim()
        if kind == "type":
            if dims and tensor.dtype == torch.float32 and tensor.is_contiguous():
                tensor = tensor.view(torch.int32)
            continue
        if kind == "unsqueeze":
            tensor = tensor.unsqueeze(draw.draw(st.integers(0, dims)))
            continue
        if dims == 0:
            continue
        dim = draw.draw(st.integers(0, dims - 1))
        size = tensor.shape[dim]
        if kind == "narrow":
            begin = draw.draw(st.integers(0, size))
            tensor = tensor.narrow(dim, begin, draw.draw(st.integers(0, size - begin)))
        elif kind == "select" and size:
            tensor = tensor.select(dim, draw.draw(st.integers(0, size - 1)))
        elif kind == "t":
            tensor = tensor.transpose(dim, draw.draw(st.integers(0, dims - 1)))
        elif kind == "flatten":
            tensor = tensor.reshape(-1) if tensor.is_contiguous() else tensor
        elif kind == "step":
            tensor = tensor[(slice(None),) * dim + (slice(None, None, draw.draw(st.integers(1, 3))),)]
        elif kind == "chunk" and size:
            parts = tensor.chunk(draw.draw(st.integers(1, 4)), dim)
            tensor = parts[draw.draw(st.integers(0, len(parts) - 1))]
    return tensor


def _fitting(target: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of both that have one shape."""
    while weight.dim() > target.dim():
        if weight.shape[0] == 0:
            return target.reshape(-1)[:0], weight.reshape(-1)[:0]
        weight = weight.select(0, 0)
    while target.dim() > weight.dim():
        if target.shape[0] == 0:
            return target.reshape(-1)[:0], weight.reshape(-1)[:0]
        target = target.select(0, 0)
    for dim in range(weight.dim()):
        size = min(weight.shape[dim], target.shape[dim])
        weight, target = weight.narrow(dim, 0, size), target.narrow(dim, 0, size)
    return target, weight


def _step(draw: st.DataObject, targets: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
    target = _some_view(draw, targets[draw.draw(st.integers(0, len(targets) - 1))])
    weight = _some_view(draw, weights[draw.draw(st.integers(0, len(weights) - 1))])
    kind = draw.draw(
        st.sampled_from(
            ["copy", "copy", "copy", "copy", "add", "fill", "write", "move", "index", "look", "cat", "data"]
        )
    )
    if kind == "fill":
        target.fill_(draw.draw(st.integers(-9, 9)))
    elif kind == "move":
        target, source = _fitting(target, _some_view(draw, targets[0]).clone())
        target.copy_(source)
    elif kind == "write" and weight.dtype == torch.float32:
        weight.mul_(2)
    elif kind == "look":
        target.fill_(int(weight.to(torch.int32).sum().item()) % 100)
    else:
        target, weight = _fitting(target, weight)
        if kind == "add":
            target.add_(weight.to(target.dtype))
        elif kind == "index" and target.dim():
            rows = torch.arange(target.shape[0]).flip(0)
            target[rows] = weight.to(target.dtype)
        elif kind == "cat" and target.dim():
            target.copy_(torch.cat([weight, weight])[: target.shape[0]])
        else:
            target.copy_(weight)


class _Replay:
    """The same random choices a second time."""

    def __init__(self, data: st.DataObject) -> None:
        self._data, self._made, self._at = data, list[object](), 0

    def again(self) -> "_Replay":
        self._at = 0
        return self

    def draw(self, strategy: st.SearchStrategy[object]) -> object:
        if self._at == len(self._made):
            self._made.append(self._data.draw(strategy))
        self._at += 1
        return self._made[self._at - 1]


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_loaders_do_the_same_directly_and_streamed(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 40), min_size=0, max_size=3), min_size=1, max_size=4))
    sizes = data.draw(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3), min_size=1, max_size=4))
    steps = data.draw(st.integers(1, 8))
    folder = tmp_path_factory.mktemp("random")
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.int32]
    weights = {
        f"w{number}": (torch.randn(shape, generator=generator) * 9).to(dtypes[number % 3])
        for number, shape in enumerate(shapes)
    }
    save_file(weights, folder / "model.safetensors")
    replay = _Replay(data)

    small_bytes = data.draw(st.sampled_from([0, 0, 256]))
    steps_between = data.draw(st.booleans())

    def run(direct: bool) -> list[torch.Tensor]:
        targets = [torch.full(size, -7, dtype=dtypes[number % 3]) for number, size in enumerate(sizes)]
        options = load_settings({"threads": 2}).settings.loader
        with contextlib.ExitStack() as stack:
            session = stack.enter_context(DirectLoad(nn.Module())) if direct else None
            read = []
            for _, weight in stream_weights([str(folder / "model.safetensors")], options, direct=session):
                read.append(weight)
                if steps_between:
                    _step(replay, targets, read)  # type: ignore[arg-type]
            for _ in range(steps):
                _step(replay, targets, read)  # type: ignore[arg-type]
            del read, weight
        return targets

    with (
        unittest.mock.patch("engine_loader.loading.direct.load.SMALL_BYTES", small_bytes),
        unittest.mock.patch("engine_loader.loading.direct.load._LULL_TENSORS", 1),
    ):
        expected = run(False)
        replay.again()
        actual = run(True)
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


class _Lull:
    """A load of a large tensor, many small ones, and a large one."""

    def __init__(self, tmp_path: Path) -> None:
        generator = torch.Generator().manual_seed(1)
        self.small = {f"small.{number:03}": torch.randn(8, generator=generator) for number in range(300)}
        self.large = {name: torch.randn(ROWS, COLUMNS, generator=generator) for name in ("a", "z")}
        self.lines: list[str] = []
        self._files = []
        # Each kind in a file of its own, for safetensors puts a file's tensors into an order of its own.
        for number, tensors in enumerate(({"a": self.large["a"]}, self.small, {"z": self.large["z"]})):
            self._files.append(str(tmp_path / f"model-{number}.safetensors"))
            save_file(tensors, self._files[-1])

    def weights(self, session: DirectLoad) -> Weights:
        settings = load_settings({"mode": "direct"}).settings.loader
        return stream_weights(self._files, settings, direct=session, tell=self.lines.append)


def test_what_was_copied_before_many_small_tensors_is_there_among_them(tmp_path: Path) -> None:
    lull, target = _Lull(tmp_path), torch.full((ROWS, COLUMNS), float("nan"))
    seen = []
    with DirectLoad(nn.Module()) as session:
        for name, weight in lull.weights(session):
            if name in ("a", "z"):
                assert type(weight) is RecordingTensor
                target.copy_(weight)
            else:
                assert torch.equal(weight, lull.small[name])
                seen.append(float(target[0, 0]))
    assert seen == [float(lull.large["a"][0, 0])] * 300
    assert torch.equal(target, lull.large["z"])


def test_a_tensor_kept_from_before_is_copied_among_many_small_ones(tmp_path: Path) -> None:
    lull, target = _Lull(tmp_path), torch.full((ROWS, COLUMNS), float("nan"))
    with DirectLoad(nn.Module()) as session:
        for name, weight in lull.weights(session):
            if name == "a":
                kept = weight
            elif name == "small.100":
                target.copy_(kept)
                assert torch.equal(target + 0, lull.large["a"])
                target.t().copy_(weight.repeat(ROWS * COLUMNS // 8).view(COLUMNS, ROWS))
        del kept, weight
    assert torch.equal(target.t().reshape(-1, 8)[5], lull.small["small.100"])


def test_a_mode_that_the_engine_puts_on_among_small_tensors_does_no_harm(tmp_path: Path) -> None:
    class Counting(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.calls += 1
            return func(*args, **(kwargs or {}))

    lull, target = _Lull(tmp_path), torch.full((ROWS, COLUMNS), float("nan"))
    with DirectLoad(nn.Module()) as session:
        weights = lull.weights(session)
        for _ in range(100):
            next(weights)
        with Counting() as mode:
            for name, weight in weights:
                if name == "z":
                    target.copy_(weight)
        assert mode.calls
        target.add_(1)
    assert torch.equal(target, lull.large["z"] + 1)
    assert "dispatch mode of its own" in lull.lines[0]


def test_very_many_small_tensors_are_streamed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_loader.loading.weights._MANY_TENSORS", 2)
    lines: list[str] = []
    for mode, kind in (("auto", torch.Tensor), ("direct", RecordingTensor)):
        settings = load_settings({"mode": mode}).settings.loader
        model = Model()
        with DirectLoad(model) as session, torch.no_grad():
            weights = dict(stream_weights([str(checkpoint)], settings, direct=session, tell=lines.append))
            assert type(weights["a"]) is kind
            model.weight.copy_(weights["a"])
        assert bool(torch.isfinite(model.weight).all())
    assert "streamed: 3 tensors this small" in lines[0]
    assert "streamed" not in lines[1]
