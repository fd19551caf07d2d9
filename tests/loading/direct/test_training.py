"""Direct mode on training checkpoints: what is copied is read of the chunks that have it, and nothing else is read."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from engine_loader import CheckpointError, SettingsError
from engine_loader.loading.direct.load import DirectLoad
from engine_loader.loading.direct.recording import RecordingTensor
from engine_loader.loading.find import TrainingCheckpoint
from engine_loader.loading.weights import stream_weights
from engine_loader.settings import load_settings
from tests.support.training_checkpoints import KINDS, boxes, save_chunked, save_training


class Model(nn.Module):
    """Parameters of the shapes that are asked for, full of NaN."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.full(shape, float("nan")), requires_grad=False))


def test_every_kind_of_checkpoint_gives_what_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(1)
    tensors = {"a": torch.randn(96, 160), "b": torch.randn(70, 3, 90), "bias": torch.randn(9000), "s": torch.randn(())}
    for kind in KINDS:
        path = save_training(tensors, tmp_path / kind, kind, prefix="net.")
        for engine in ("cpp", "python"):
            options = load_settings({"key_mapping": {"^net[.]": ""}, "engine": engine}).settings.loader
            model = Model({name: tuple(tensor.shape) for name, tensor in tensors.items()})
            with DirectLoad(model) as load, torch.no_grad():
                for name, tensor in stream_weights(TrainingCheckpoint(str(path)), options, direct=load):
                    getattr(model, name).copy_(tensor)
            for name, tensor in tensors.items():
                assert torch.equal(getattr(model, name), tensor), (kind, name)
            for name, tensor in stream_weights(TrainingCheckpoint(str(path)), options):
                assert torch.equal(tensor, tensors[name]), (kind, name)


def test_a_rank_reads_its_half_only_and_the_line_counts_the_files(tmp_path: Path) -> None:
    tensors = {"rows": torch.randn(60, 5000), "columns": torch.randn(60, 5000)}
    total = sum(tensor.nbytes for tensor in tensors.values())
    for kind in ("torchs_own", "fsdp", "columns", "mesh"):
        path = save_training(tensors, tmp_path / kind, kind, prefix="")
        model = Model({"rows": (30, 5000), "columns": (60, 2500)})
        lines: list[str] = []
        with DirectLoad(model) as load, torch.no_grad():
            options = load_settings({"read_mode": "buffered"}).settings.loader
            for name, tensor in stream_weights(TrainingCheckpoint(str(path)), options, direct=load, tell=lines.append):
                getattr(model, name).copy_(tensor[30:] if name == "rows" else tensor[:, :2500])
                del tensor  # what is kept would be read whole in the end
        assert torch.equal(model.rows, tensors["rows"][30:])
        assert torch.equal(model.columns, tensors["columns"][:, :2500])
        (report,) = load.reports
        assert report.bytes_kept == total // 2
        assert report.bytes_read < 0.7 * total  # with the optimizer's state, the files have twice the total
        assert report.files == {"fsdp": 2, "columns": 2, "mesh": 4, "torchs_own": 1}[kind]
        assert lines[0].startswith("loaded 1.14 MiB of 2.29 MiB (2 tensors, ")


@st.composite
def _cases(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]], list[tuple[int, int, int]], list[int]]:
    """A shape, where it is cut, a slice of each dimension, and an order of dimensions."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    cuts = [sorted(draw(st.sets(st.integers(1, size - 1), max_size=2))) if size > 1 else [] for size in shape]
    slices = []
    for size in shape:
        begin = draw(st.integers(0, size - 1))
        slices.append((begin, draw(st.integers(begin + 1, size)), draw(st.sampled_from([1, 1, 1, 2, 3]))))
    return shape, cuts, slices, draw(st.permutations(range(len(shape))))


@settings(max_examples=12)
@given(_cases(), st.sampled_from([[], [], [100], [7, 600]]))
def test_any_view_of_any_cut_is_what_it_is_of_the_whole(
    case: tuple[tuple[int, ...], list[list[int]], list[tuple[int, int, int]], list[int]], inner: list[int]
) -> None:
    shape, cuts, slices, order = case
    # Wide enough that runs are not too short to be planned.
    whole = torch.arange(torch.Size(shape).numel() * 1200, dtype=torch.int32).reshape(*shape, 1200)
    index = (*(slice(*each) for each in slices), slice(5, 1101))
    expected = whole[index].permute(*order, len(shape))
    with tempfile.TemporaryDirectory() as scratch:
        save_chunked({"whole": whole}, Path(scratch), lambda *_: [*cuts, inner])
        target = nn.Parameter(torch.full_like(expected, -1), requires_grad=False)
        model = nn.Module()
        model.register_parameter("target", target)
        with DirectLoad(model) as load, torch.no_grad():
            options = load_settings({}).settings.loader
            for _, tensor in stream_weights(TrainingCheckpoint(scratch), options, direct=load):
                target.copy_(tensor[index].permute(*order, len(shape)))
    assert torch.equal(target, expected)


def test_views_that_are_reshaped_across_chunks(tmp_path: Path) -> None:
    whole = torch.randn(96, 200)
    for cuts in ([[10, 50]], [[], [70]], [[33], [64, 130]]):
        path = tmp_path / str(cuts)
        save_chunked({"w": whole}, path, lambda *_, cuts=cuts: cuts)
        model = Model({"heads": (4, 8, 200), "flat": (9600,), "part": (2, 3, 100)})
        with DirectLoad(model) as load, torch.no_grad():
            for _, tensor in stream_weights(
                TrainingCheckpoint(str(path)), load_settings({}).settings.loader, direct=load
            ):
                model.heads.copy_(tensor.view(4, 3, 8, 200)[:, 1])
                model.flat.copy_(tensor.reshape(-1)[5000:14600])
                model.part.copy_(tensor.view(32, 3, 200)[7:9, :, 100:])
                del tensor  # what is kept would be read whole in the end
        assert load.materialised == {}
        assert torch.equal(model.heads, whole.view(4, 3, 8, 200)[:, 1])
        assert torch.equal(model.flat, whole.reshape(-1)[5000:14600])
        assert torch.equal(model.part, whole.view(32, 3, 200)[7:9, :, 100:])


def test_what_is_no_plain_bytes_is_streamed(tmp_path: Path) -> None:
    tensors = {
        "turned": torch.randn(300, 200).t(),
        "scattered": torch.randn(30, 40, 50),
        "plain": torch.randn(100, 100),
    }
    cuts = {"scattered": [[10], [20], [30]]}
    save_chunked(tensors, tmp_path / "c", lambda name, _: cuts.get(name, []))
    # Stored as it is, strides and all, where the helper would make it contiguous.
    import torch.distributed.checkpoint as torch_dcp

    torch_dcp.save({"turned": tensors["turned"]}, checkpoint_id=tmp_path / "turned", no_dist=True)
    for place, names in (("c", list(tensors)), ("turned", ["turned"])):
        model = Model({name: tuple(tensors[name].shape) for name in names})
        with DirectLoad(model) as load, torch.no_grad():
            for name, tensor in stream_weights(
                TrainingCheckpoint(str(tmp_path / place)), load_settings({}).settings.loader, direct=load
            ):
                assert (type(tensor) is RecordingTensor) == (place == "c" and name != "scattered")
                getattr(model, name).copy_(tensor)
        for name in names:
            assert torch.equal(getattr(model, name), tensors[name])
        assert load.reports[0].bytes_kept == sum(tensors[name].nbytes for name in names)


def test_a_file_that_was_cut_short_is_told_with_the_tensor(tmp_path: Path) -> None:
    path = save_training({"w": torch.randn(400, 400)}, tmp_path / "c", "fsdp", prefix="")
    options = load_settings({}).settings.loader
    model = Model({"w": (400, 400)})
    stream = stream_weights(TrainingCheckpoint(str(path)), options)
    with (path / "__1_0.distcp").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match=r"__1_0.distcp.*'w' is .* bytes here, but the file ends after 5000"):
        next(stream)
    del model


def test_a_mapping_where_there_is_no_training_is_told_in_the_line(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    lines: list[str] = []
    options = load_settings({"key_mapping": {"a": "b"}}).settings.loader
    assert [name for name, _ in stream_weights([str(tmp_path / "model.safetensors")], options, tell=lines.append)] == [
        "a"
    ]
    assert lines[0].endswith("; key_mapping is for training checkpoints and was not applied")


def test_a_function_maps_names_and_leaves_some_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_training({"a": torch.zeros(3), "b": torch.ones(3)}, tmp_path / "c", "torch_save")
    (tmp_path / "names_of_ours.py").write_text(
        "def new(name):\n    return None if name.endswith('b') else name.removeprefix('model.')\n"
        "def bad(name):\n    return 1 / 0\ndef other(name):\n    return 3\nnumber = 4\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = load_settings({"key_mapping": "names_of_ours:new"}).settings.loader
    assert [name for name, _ in stream_weights(TrainingCheckpoint(str(path)), options)] == ["a"]
    for place, error, told in (
        ("names_of_ours:none", SettingsError, r"key_mapping: the module 'names_of_ours' has no function 'none'"),
        ("names_of_ours:number", SettingsError, r"key_mapping: the module 'names_of_ours' holds 4 and no function"),
        ("no.such:new", SettingsError, r"key_mapping: the module 'no.such' of .* cannot be imported: ModuleNotFound"),
        ("names_of_ours:bad", CheckpointError, r"key_mapping: names_of_ours:bad failed for 'model.a': ZeroDivision"),
        ("names_of_ours:other", CheckpointError, r"key_mapping: names_of_ours:other made 3 of 'model.a'"),
    ):
        options = load_settings({"key_mapping": place}).settings.loader
        with pytest.raises(error, match=told):
            list(stream_weights(TrainingCheckpoint(str(path)), options))


def test_boxes_cover_a_tensor() -> None:
    assert boxes((4, 3), [[1], [2]]) == [((0, 0), (1, 2)), ((0, 2), (1, 1)), ((1, 0), (3, 2)), ((1, 2), (3, 1))]


def test_rows_that_a_layout_reorders_are_so_in_direct_mode(tmp_path: Path) -> None:
    stored = torch.randn(32, 5000)
    tensors = {f"layers.0.attention.w{part}.weight": stored for part in "qkv"}
    path = save_training(tensors, tmp_path / "c", "fsdp", prefix="")
    options = load_settings({"key_mapping": "torchtitan-llama:4"}).settings.loader
    order = [head * 4 + row for head in range(8) for row in (0, 2, 1, 3)]
    model = Model(dict.fromkeys("qkv", (16, 5000)))
    with DirectLoad(model) as load, torch.no_grad():
        for name, tensor in stream_weights(TrainingCheckpoint(str(path)), options, direct=load):
            getattr(model, name.split(".")[-2][0]).copy_(tensor[16:])
            del tensor
    assert torch.equal(model.q, stored[order][16:])
    assert torch.equal(model.k, stored[order][16:])
    assert torch.equal(model.v, stored[16:])
