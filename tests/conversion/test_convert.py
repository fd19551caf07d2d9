"""``convert_checkpoint``: the same bytes under another kind, complete or not there, in bounded memory."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from engine_loader import CheckpointError, SettingsError, dcp, open_checkpoint
from engine_loader.conversion import convert_checkpoint
from tests.support.moto_server import MotoServer
from tests.support.training_checkpoints import KINDS, save_training

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

DTYPES = (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn)


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    kinds = {f"layers.{number}.{dtype}": torch.randn(17, 9).to(dtype) for number, dtype in enumerate(DTYPES)}
    odd = {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "nan": torch.tensor([float("nan"), -0.0])}
    return {**kinds, **odd, **{f"w.{number}": torch.randn(64, 64) for number in range(6)}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Hugging Face directory, in two shards, with what else lies there."""
    directory = tmp_path / "model"
    directory.mkdir()
    tensors = tensors_of_all_kinds()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:8], names[8:])):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float32"}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(b"not to be copied")
    (directory / ".hidden").write_text("nor this")
    return directory


def read(directory: Path) -> dict[str, torch.Tensor]:
    """By safetensors' own reader."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def left_beside(path: Path) -> list[str]:
    """What a conversion left where its destination is."""
    return sorted(entry.name for entry in path.parent.iterdir() if entry.name.startswith(f".{path.name}-"))


@pytest.mark.parametrize("items", ["torch_save", "safetensors"])
def test_there_and_back_every_bit_is_the_same(items: Any, model: Path, tmp_path: Path) -> None:
    original = tensors_of_all_kinds()
    training, back = tmp_path / "training", tmp_path / "deep" / "back"
    done = convert_checkpoint(str(model), str(training), to="dcp", items=items)
    assert (done.tensors, done.nbytes) == (len(original), sum(tensor.nbytes for tensor in original.values()))
    assert [path.name for path in done.files] == ["__0_0.distcp"]
    assert {path.name for path in training.iterdir()} == {".metadata", "__0_0.distcp", "config.json", "tokenizer.json"}
    reader = torch_dcp.FileSystemReader(training) if items == "torch_save" else dcp.FileSystemReader(training)
    loaded = {name: torch.full_like(tensor, 1) for name, tensor in original.items()}
    torch_dcp.load(loaded, storage_reader=reader, no_dist=True)
    assert bits(loaded) == bits(original)

    shown: list[tuple[int, int]] = []
    done = convert_checkpoint(
        str(training), str(back), max_shard_bytes=40_000, progress=lambda *both: shown.append(both)
    )
    assert bits(read(back)) == bits(original)
    assert shown[0] == (0, done.nbytes)
    assert shown[-1] == (done.nbytes, done.nbytes)
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} < {path.name for path in back.iterdir()}
    assert not left_beside(training)
    assert not left_beside(back)
    # torch's own reader of Hugging Face directories, and its writer's files as a source.
    loaded = {name: torch.full_like(tensor, 1) for name, tensor in original.items() if tensor.numel()}
    torch_dcp.load(loaded, storage_reader=HuggingFaceStorageReader(str(back)), no_dist=True)
    assert bits(loaded) == {name: value for name, value in bits(original).items() if name in loaded}


@pytest.mark.parametrize("kind", KINDS)
def test_trainings_of_every_kind_become_safetensors(kind: str, tmp_path: Path) -> None:
    tensors = {"embed": torch.randn(50, 30), "layers.0.w": torch.randn(30, 60).bfloat16(), "b": torch.randn(7)}
    training = save_training(tensors, tmp_path / "training", kind)
    done = convert_checkpoint(str(training), str(tmp_path / "out"), key_mapping={"^model[.]": ""})
    assert [path.name for path in done.files] == ["model.safetensors"]
    assert bits(read(tmp_path / "out")) == bits(tensors)
    convert_checkpoint(str(training), str(tmp_path / "all"), optimizer_state=True)
    assert set(read(tmp_path / "all")) == {
        name for key in tensors for name in (f"model.{key}", f"optimizer.state.{key}.exp_avg")
    }


def test_a_whole_training_changes_its_items_and_resumes(tmp_path: Path) -> None:
    network = torch.nn.Linear(20, 10)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.125)
    network(torch.randn(3, 20)).sum().backward()
    optimizer.step()
    state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "step": 7, "name": "ours"}
    torch_dcp.save(state, checkpoint_id=tmp_path / "one", no_dist=True)
    convert_checkpoint(
        str(tmp_path / "one"), str(tmp_path / "two"), to="dcp", items="safetensors", optimizer_state=True
    )
    convert_checkpoint(str(tmp_path / "two"), str(tmp_path / "three"), to="dcp", optimizer_state=True)
    for place, reader in (("two", dcp.FileSystemReader), ("three", torch_dcp.FileSystemReader)):
        other = torch.nn.Linear(20, 10)
        another = torch.optim.AdamW(other.parameters(), lr=0.5)
        other(torch.zeros(3, 20)).sum().backward()
        another.step()
        loaded = {"model": other.state_dict(), "optimizer": another.state_dict(), "step": 0, "name": ""}
        torch_dcp.load(loaded, storage_reader=reader(tmp_path / place), no_dist=True)
        assert (loaded["step"], loaded["name"]) == (7, "ours")
        assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
        assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])
        assert torch.equal(loaded["model"]["weight"], state["model"]["weight"])
    # As torch's own converter takes it apart, with the keys of the nested state dict.
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(tmp_path / "three", tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert torch.equal(whole["optimizer"]["state"]["0"]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])

    convert_checkpoint(str(tmp_path / "one"), str(tmp_path / "bare"), to="dcp")
    names = torch_dcp.FileSystemReader(tmp_path / "bare").read_metadata().state_dict_metadata
    assert set(names) == {"model.weight", "model.bias"}


def test_another_type_for_floats_and_the_configuration_says_so(model: Path, tmp_path: Path) -> None:
    convert_checkpoint(str(model), str(tmp_path / "out"), dtype=torch.bfloat16)
    wide = (torch.float64, torch.float32, torch.float16)
    expected = {
        name: tensor.bfloat16() if tensor.dtype in wide else tensor for name, tensor in tensors_of_all_kinds().items()
    }
    assert bits(read(tmp_path / "out")) == bits(expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    convert_checkpoint(str(model), str(tmp_path / "dcp"), to="dcp", dtype=torch.bfloat16)
    with open_checkpoint(tmp_path / "dcp") as checkpoint:
        assert bits(dict(checkpoint.tensors())) == bits(expected)


def test_safetensors_get_other_names_and_shards(model: Path, tmp_path: Path) -> None:
    def rename(name: str) -> str | None:
        return None if name.startswith("layers.") else f"net.{name}"

    done = convert_checkpoint(str(model), str(tmp_path / "out"), key_mapping=rename, max_shard_bytes=33_000)
    assert set(read(tmp_path / "out")) == {
        f"net.{name}" for name in tensors_of_all_kinds() if not name.startswith("layers.")
    }
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.nbytes
    assert {path.name for path in done.files} == set(index["weight_map"].values())
    assert all(path.stat().st_size < 40_000 for path in done.files)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert len(checkpoint) == done.tensors


@pytest.mark.servers
def test_a_prefix_of_an_object_store_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a": torch.randn(30, 40), "b": torch.randn(5)}
    training = save_training(tensors, tmp_path / "training", "fsdp", prefix="")
    (training / "config.json").write_text("{}")
    with MotoServer() as moto:
        moto.put("bucket", {f"step-1/{path.name}": path.read_bytes() for path in training.iterdir()})
        values = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": moto.url}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        convert_checkpoint("s3://bucket/step-1/", str(tmp_path / "out"))
    assert bits(read(tmp_path / "out")) == bits(tensors)
    assert (tmp_path / "out" / "config.json").exists()


def test_what_is_there_is_overwritten_only_when_asked_and_only_a_checkpoint(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty one is taken
    convert_checkpoint(str(model), str(out))
    (out / "old").write_text("")
    with pytest.raises(CheckpointError, match=r"out: the destination holds something .*--overwrite"):
        convert_checkpoint(str(model), str(out))
    convert_checkpoint(str(model), str(out), to="dcp", overwrite=True)
    assert {path.name for path in out.iterdir()} == {".metadata", "__0_0.distcp", "config.json", "tokenizer.json"}
    assert not left_beside(out)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    for destination, told in (
        (tmp_path / "home", "not overwritten, because it is not a checkpoint"),
        (tmp_path / "home" / "letter", "this is a file"),
        (model, "source and destination are one"),
        (tmp_path, "one within the other"),
        ("s3://bucket/out", "a conversion is written to a directory .*upload"),
    ):
        with pytest.raises(CheckpointError, match=told):
            convert_checkpoint(str(model), str(destination), overwrite=True)
    assert (tmp_path / "home" / "letter").read_text() == "dear"


def test_what_cannot_be_converted_is_told_and_nothing_is_left(model: Path, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, make(tmp_path / "sharded") / "model-rank-0-part-0.safetensors")
    torch_dcp.save({"a": torch.zeros(2, dtype=torch.complex128)}, checkpoint_id=tmp_path / "wide", no_dist=True)
    torch_dcp.save({"optimizer": {"a": torch.zeros(2)}}, checkpoint_id=tmp_path / "optimizer", no_dist=True)
    make(tmp_path / "empty")
    out = tmp_path / "out"
    for source, options, told in (
        ("sharded", {}, "this is a sharded_state checkpoint"),
        ("wide", {}, "'a' is complex128, which safetensors cannot hold"),
        ("optimizer", {}, "there are no tensors to convert"),
        ("empty", {}, "no .safetensors file"),
        ("nothing", {}, "nothing: could not open"),
        ("model", {"key_mapping": {".+": "same"}}, "both become 'same'"),
        ("model", {"optimizer_state": True}, "go with a DCP directory"),
    ):
        with pytest.raises(CheckpointError, match=told):
            convert_checkpoint(str(tmp_path / source), str(out), **options)
        assert not out.exists()
        assert not left_beside(out)
    with pytest.raises(SettingsError, match="key_mapping: the module 'no_such'"):
        convert_checkpoint(str(model), str(out), key_mapping="no_such:function")
    convert_checkpoint(str(tmp_path / "wide"), str(out), to="dcp")
    assert torch_dcp.FileSystemReader(out).read_metadata().state_dict_metadata["a"].properties.dtype == torch.complex128


def make(directory: Path) -> Path:
    directory.mkdir()
    return directory


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/engine-loader-bomb",)


def test_hostile_and_damaged_sources_leave_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    training = save_training({"w": torch.randn(300, 300)}, tmp_path / "training", "fsdp")
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with (training / "__1_0.distcp").open("r+b") as file:
        file.truncate(2000)
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    for source, told in (
        (tmp_path / "hostile", "posix.mkdir.*which no checkpoint needs; nothing of it was run"),
        (training, r"__1_0.distcp: .*the file ends after 2000"),
        (model, r"model-00002-of-00002.safetensors: the data is cut short"),
    ):
        for to in ("safetensors", "dcp"):
            with pytest.raises(CheckpointError, match=told):
                convert_checkpoint(str(source), str(out), to=to)
            assert not out.exists()
            assert not left_beside(out)
    assert not Path("/tmp/engine-loader-bomb").exists()


@contextmanager
def full_disk(nbytes: int) -> Iterator[None]:
    """A limit on the size of files, which the kernel enforces as it does a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("items", [None, "torch_save", "safetensors"])
def test_a_full_disk_leaves_the_old_one_or_nothing(items: Any, tmp_path: Path) -> None:
    save_file({f"t{number}": torch.randn(1000, 100) for number in range(10)}, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    way: dict[str, Any] = {} if items is None else {"to": "dcp", "items": items}
    for before in (False, True):
        if before:
            save_file({"old": torch.zeros(3)}, make(out) / "model.safetensors")
        with full_disk(2_000_000), pytest.raises(CheckpointError, match="out: it could not be written: File too large"):
            convert_checkpoint(str(tmp_path / "model.safetensors"), str(out), overwrite=True, **way)
        assert set(read(out)) == ({"old"} if before else set())
        assert out.exists() == before
        assert not left_beside(out)


def test_no_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    too_large = free.f_frsize * free.f_blocks + (1 << 40)
    header = json.dumps({"w": {"dtype": "U8", "shape": [too_large], "data_offsets": [0, too_large]}}).encode()
    with (tmp_path / "huge.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + too_large)
        except OSError:
            pytest.skip("this file system has no files as large")
    with pytest.raises(CheckpointError, match=r"out: it takes .*, and .* are free there"):
        convert_checkpoint(str(tmp_path / "huge.safetensors"), str(tmp_path / "out"))
    assert not left_beside(tmp_path / "out")


@pytest.mark.parametrize("to", ["safetensors", "dcp"])
def test_ctrl_c_leaves_nothing(to: Any, tmp_path: Path) -> None:
    save_file({f"t{number}": torch.randn(1000, 100) for number in range(20)}, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    for moment in (0.0, 0.5, 1.0):

        def interrupt(done: int, total: int, moment: float = moment) -> None:
            if done >= moment * total:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(str(tmp_path / "model.safetensors"), str(out), to=to, progress=interrupt)
        assert not out.exists()
        assert not left_beside(out)


def test_ctrl_c_ends_the_command_in_silence(tmp_path: Path) -> None:
    save_file({"t": torch.randn(1000, 100)}, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "convert", tmp_path / "model.safetensors", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode not in (0, -signal.SIGINT)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not left_beside(tmp_path / "out")


INTERRUPTED = """
import os, signal
from engine_loader.cli import app
from engine_loader.conversion import destination
destination.sync_directory = lambda path: os.kill(os.getpid(), signal.SIGINT)  # when all is written and nothing renamed
app()
"""

PEAK = """
import json, sys
import torch
from engine_loader import dcp  # what is imported is not what is measured
from engine_loader.conversion import convert_checkpoint

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

torch.set_num_threads(1)
source = sys.argv[1]
for number, options in enumerate(json.loads(sys.argv[3])):
    open("/proc/self/clear_refs", "w").write("5")
    before = kib("VmRSS")
    out = f"{sys.argv[2]}/{number}"
    convert_checkpoint(source, out, read_mode="buffered", buffer_bytes="32MiB", **options)
    print((kib("VmHWM") - before) * 1024)
    source = out
"""


def test_memory_holds_what_is_read_ahead_and_a_tensor(tmp_path: Path) -> None:
    """Of a checkpoint of 200 MiB."""
    tensors = {f"t{number}": torch.full((8 << 20,), number, dtype=torch.uint8) for number in range(25)}
    save_file(tensors, tmp_path / "model.safetensors")
    ways = [{"to": "dcp"}, {"to": "dcp", "items": "safetensors"}, {}]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "model.safetensors", tmp_path / "out", json.dumps(ways)],
        # Else glibc keeps what was freed, a few times over, and its habits would be measured.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peaks = [int(line) for line in done.stdout.split()]
    print(f"peaks of {[peak >> 20 for peak in peaks]} MiB")
    assert len(peaks) == len(ways)
    assert max(peaks) < 64 << 20
    assert bits(read(tmp_path / "out" / "2")) == bits(tensors)


@pytest.fixture
def float4(tmp_path: Path) -> Path:
    """A training checkpoint with a tensor of 4-bit numbers, two in an element of torch's."""
    state = {"w": torch.arange(8, dtype=torch.uint8).reshape(4, 2).view(torch.float4_e2m1fn_x2), "s": torch.ones(2)}
    torch_dcp.save(state, checkpoint_id=tmp_path / "float4", no_dist=True)
    return tmp_path / "float4"


def test_float4_has_the_shape_of_its_numbers_in_a_header(float4: Path, tmp_path: Path) -> None:
    convert_checkpoint(str(float4), str(tmp_path / "out"))
    convert_checkpoint(str(tmp_path / "out"), str(tmp_path / "back"), to="dcp")
    convert_checkpoint(str(tmp_path / "back"), str(tmp_path / "again"))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as theirs:  # their reader refuses a wrong shape
        assert theirs.get_slice("w").get_shape() == [4, 4]
        assert theirs.get_slice("w").get_dtype() == "F4"
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    for directory in (float4, tmp_path / "out", tmp_path / "back"):
        with open_checkpoint(directory) as checkpoint:
            tensor = checkpoint.get_tensor("w")
            assert (tensor.dtype, tensor.shape) == (torch.float4_e2m1fn_x2, (4, 2))
            assert tensor.view(torch.uint8).flatten().tolist() == list(range(8))
            assert checkpoint.info("w").shape == (4, 4)


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_a_type_may_be_given_by_its_name(name: str, model: Path, tmp_path: Path) -> None:
    convert_checkpoint(str(model), str(tmp_path / "named"), dtype=name)
    convert_checkpoint(str(model), str(tmp_path / "typed"), dtype=torch.bfloat16)
    assert bits(read(tmp_path / "named")) == bits(read(tmp_path / "typed"))
    assert read(tmp_path / "named")["w.0"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "named" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["bfloat17", "int8", "nn", torch.int8])
def test_what_is_no_floating_point_type_is_refused(dtype: Any, model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is not a floating-point type"):
        convert_checkpoint(str(model), str(tmp_path / "out"), dtype=dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["safetensors", "dcp"])
def test_an_output_that_our_own_reader_refuses_is_not_published(
    to: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine_loader.conversion import convert

    write = {"safetensors": convert.write_safetensors, "dcp": convert.write_dcp}[to]

    def write_and_damage(directory: Path, *args: Any, **options: Any) -> None:
        write(directory, *args, **options)
        for path in (*directory.glob("*.safetensors"), *directory.glob("*.distcp")):
            path.write_bytes(path.read_bytes()[:-3])

    monkeypatch.setattr(convert, write.__name__, write_and_damage)
    with pytest.raises(CheckpointError):
        convert_checkpoint(str(model), str(tmp_path / "out"), to=to)
    assert not (tmp_path / "out").exists()


def test_an_output_with_other_tensors_is_not_published(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine_loader.conversion import convert

    def write(directory: Path, *_: Any, **__: Any) -> None:
        tensors = tensors_of_all_kinds()
        tensors["w.0"] = tensors["w.0"][:1]
        save_file(tensors, directory / "model.safetensors")

    monkeypatch.setattr(convert, "write_safetensors", write)
    with pytest.raises(CheckpointError, match=r"'w\.0' was to be \('F32', \(64, 64\), 16384\), and is .*\(1, 64\)"):
        convert_checkpoint(str(model), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
