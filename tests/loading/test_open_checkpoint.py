"""What open_checkpoint opens, and what it tells about it."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine_loader import CheckpointError, SettingsError, TensorNotFoundError, open_checkpoint
from engine_loader.formats.hf_index import INDEX_NAME
from tests.support.checkpoints import checkpoint, entry, index, tensor_bytes
from tests.support.resources import left_open, open_resources

A, B, C = entry("F32", [4, 3], 1), entry("BF16", [5], 2), entry("U8", [7], 3)


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def contents(path: object, **options: object) -> dict[str, bytes]:
    with open_checkpoint(path, **options) as opened:
        found = {name: tensor_bytes(tensor) for name, tensor in opened.tensors()}
        assert list(found) == opened.keys()
        assert {name: tensor_bytes(opened.get_tensor(name)) for name in opened} == found
    return found


def test_a_single_file(tmp_path):
    path = put(tmp_path / "weights.bin", checkpoint({"a": A, "b": B}))
    assert contents(path) == {"a": A[2], "b": B[2]}
    assert contents(str(path)) == {"a": A[2], "b": B[2]}


def test_a_directory_without_index_reads_its_shards_in_natural_order(tmp_path):
    for number in (10, 9, 1):
        put(tmp_path / f"model-{number}.safetensors", checkpoint({f"t{number}": entry("U8", [4], number)}))
    put(tmp_path / "config.json", b"{}")
    put(tmp_path / "pytorch_model.bin", b"not ours")
    (tmp_path / "not-a-file.safetensors").mkdir()
    assert list(contents(tmp_path)) == ["t1", "t9", "t10"]


@pytest.mark.parametrize("ending", ["", "/", "//"])
def test_a_directory_with_index_reads_the_shards_that_it_names(tmp_path, ending):
    put(tmp_path / "model-00001-of-00002.safetensors", checkpoint({"a": A}))
    put(tmp_path / "model-00002-of-00002.safetensors", checkpoint({"b": B}))
    put(tmp_path / "consolidated.safetensors", checkpoint({"a": A, "b": B}))
    names = {"b": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"}
    put(tmp_path / INDEX_NAME, index(names))
    assert contents(f"{tmp_path}{ending}") == {"a": A[2], "b": B[2]}


def test_a_relative_path(tmp_path, monkeypatch):
    put(tmp_path / "one.safetensors", checkpoint({"a": A}))
    put(tmp_path / INDEX_NAME, index({"a": "one.safetensors"}))
    monkeypatch.chdir(tmp_path)
    assert contents(".") == contents("one.safetensors") == contents(["one.safetensors"]) == {"a": A[2]}


def test_shards_in_directories_of_their_own_are_not_mixed_up(tmp_path):
    put(tmp_path / "x" / "model.safetensors", checkpoint({"a": A, "b": entry("BF16", [5], 9)}))
    put(tmp_path / "y" / "model.safetensors", checkpoint({"b": B, "a": entry("F32", [4, 3], 9)}))
    put(tmp_path / INDEX_NAME, index({"a": "x/model.safetensors", "b": "y/model.safetensors"}))
    assert contents(tmp_path) == {"a": A[2], "b": B[2]}


def test_a_tensor_in_two_shards_is_read_from_the_one_that_the_index_names(tmp_path):
    put(tmp_path / "1.safetensors", checkpoint({"a": entry("F32", [4, 3], 9), "b": B}))
    put(tmp_path / "2.safetensors", checkpoint({"a": A}))
    put(tmp_path / INDEX_NAME, index({"a": "2.safetensors", "b": "1.safetensors"}))
    assert contents(tmp_path) == {"b": B[2], "a": A[2]}


def test_a_tensor_that_the_index_forgot_is_read_all_the_same(tmp_path):
    put(tmp_path / "1.safetensors", checkpoint({"a": A, "a.scale": C}))
    put(tmp_path / INDEX_NAME, index({"a": "1.safetensors"}))
    assert contents(tmp_path) == {"a": A[2], "a.scale": C[2]}


def test_links_are_followed_as_the_hub_cache_lays_them(tmp_path):
    blob = put(tmp_path / "blobs" / "0123abcd", checkpoint({"a": A}))
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(blob, snapshot))
    (snapshot / "loop").symlink_to("loop")
    assert contents(snapshot) == {"a": A[2]}


def test_a_list_of_files_keeps_its_order(tmp_path):
    one, two = put(tmp_path / "1", checkpoint({"a": A})), put(tmp_path / "2", checkpoint({"b": B}))
    assert list(contents([two, str(one)])) == ["b", "a"]
    assert list(contents((one, two))) == ["a", "b"]


@pytest.mark.parametrize("backend", ["auto", "memory"])
@pytest.mark.parametrize("path", ["/m", "/m/", "/m/w.safetensors", ["/m/w.safetensors"], "/m/../m/./w.safetensors"])
def test_files_in_memory(backend, path):
    files = {"/m/w.safetensors": bytearray(checkpoint({"a": A})), "/other.safetensors": b"?"}
    assert contents(path, backend=backend, files=files) == {"a": A[2]}


@pytest.mark.parametrize(("path", "name"), [("/", "/w.safetensors"), (".", "w.safetensors"), (".", "./w.safetensors")])
def test_files_in_memory_may_lie_at_the_root(path, name):
    assert contents(path, files={name: checkpoint({"a": A})}) == {"a": A[2]}


def test_files_in_memory_need_no_settings(monkeypatch):
    monkeypatch.setenv("ENGINE_LOADER_LOADER__BACKEND", "posix")
    assert contents("/w", files={"/w": checkpoint({"a": A})}) == {"a": A[2]}


def test_keys_and_info_tell_where_a_tensor_lies(tmp_path):
    content = checkpoint({"a": A, "b": B})
    path = put(tmp_path / "w.safetensors", content)
    with open_checkpoint(path) as opened:
        info = opened.info("b")
        assert (info.name, info.dtype, info.shape, info.nbytes) == ("b", "BF16", (5,), 10)
        assert info.file == str(path)
        assert content[info.offset : info.offset + info.nbytes] == B[2]
        assert (len(opened), "a" in opened, "x" in opened, 3 in opened) == (2, True, False, False)


def test_metadata_of_all_files_counts_and_the_first_wins(tmp_path):
    one = put(tmp_path / "1", checkpoint({"a": A}, {"format": "pt", "x": "1"}))
    two = put(tmp_path / "2", checkpoint({"b": B}, {"y": "2", "x": "other"}))
    with open_checkpoint([one, two]) as opened:
        assert opened.metadata() == {"format": "pt", "x": "1", "y": "2"}


def test_what_safetensors_writes_is_read(tmp_path):
    tensors = {"w": torch.randn(3, 4), "i": torch.arange(5), "s": torch.tensor(2.5), "e": torch.empty(0, 2)}
    save_file(tensors, tmp_path / "w.safetensors", {"format": "pt"})
    with open_checkpoint(tmp_path) as opened:
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in opened.tensors())
        assert sorted(opened.keys()) == sorted(tensors)


def test_names_choose_tensors_and_the_file_keeps_its_order(tmp_path):
    path = put(tmp_path / "w", checkpoint({"a": A, "b": B, "c": C}))
    with open_checkpoint(path) as opened:
        assert [name for name, _ in opened.tensors(["c", "a", "c"])] == ["a", "c"]
        assert list(opened.tensors([])) == []


@pytest.mark.parametrize("use", ["tensors", "get_tensor", "get_slice", "info", "load_into"])
def test_an_unknown_name_is_answered_with_the_nearest(tmp_path, use):
    names = {f"model.layers.{i}.mlp.{p}_proj.weight": C for i in range(3) for p in ("up", "down")}
    path = put(tmp_path / "w", checkpoint(names))
    wrong = "model.layers.1.mlp.upproj.weight"
    with open_checkpoint(path) as opened:
        calls = {
            "tensors": lambda: opened.tensors([wrong]),
            "load_into": lambda: opened.load_into({wrong: torch.empty(7)}),
        }
        with pytest.raises(TensorNotFoundError) as caught:
            calls.get(use, lambda: getattr(opened, use)(wrong))()
    assert f"no tensor named '{wrong}'" in str(caught.value)
    assert "did you mean 'model.layers.1.mlp.up_proj.weight'" in str(caught.value)
    assert isinstance(caught.value, KeyError)


def test_a_name_like_no_other_is_answered_with_where_to_look(tmp_path):
    path = put(tmp_path / "w", checkpoint({"a": A}))
    with open_checkpoint(path) as opened, pytest.raises(TensorNotFoundError, match=r"list the names with \.keys\(\)"):
        opened.get_tensor("zzzzzz")


def test_a_name_is_suggested_in_a_moment_among_a_hundred_thousand():
    names = [f"model.layers.{i}.mlp.experts.{j}.gate_proj.weight" for i in range(100) for j in range(1000)]
    error = TensorNotFoundError.among("model.layers.7.mlp.experts.77.gate.weight", names, None)
    assert "'model.layers.7.mlp.experts.77.gate_proj.weight'" in str(error)


def test_two_files_with_one_name_need_an_index(tmp_path):
    put(tmp_path / "1.safetensors", checkpoint({"a": A, "b": B}))
    put(tmp_path / "2.safetensors", checkpoint({"a": A}))
    with pytest.raises(CheckpointError, match=r"2\.safetensors: 'a' is also in .*1\.safetensors"):
        open_checkpoint(tmp_path)


def test_an_index_that_puts_a_tensor_where_it_is_not_says_where_it_is(tmp_path):
    put(tmp_path / "1.safetensors", checkpoint({"a": A}))
    put(tmp_path / "2.safetensors", checkpoint({"b": B}))
    put(tmp_path / INDEX_NAME, index({"a": "1.safetensors", "b": "1.safetensors"}))
    with open_checkpoint(tmp_path) as opened, pytest.raises(CheckpointError) as caught:
        opened.get_tensor("b")
    assert "puts 'b' into '1.safetensors', which does not have it" in str(caught.value)
    put(tmp_path / INDEX_NAME, index({"a": "2.safetensors", "b": "2.safetensors"}))
    with open_checkpoint(tmp_path) as opened, pytest.raises(CheckpointError, match="which does not have it"):
        opened.get_tensor("a")


def test_an_index_that_names_a_tensor_in_another_shard_says_in_which(tmp_path):
    put(tmp_path / "1.safetensors", checkpoint({"a": A, "b": B}))
    put(tmp_path / "2.safetensors", checkpoint({"c": C}))
    put(tmp_path / INDEX_NAME, index({"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}))
    with pytest.raises(CheckpointError, match=r"it is in .*/1\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named_with_what_it_should_hold(tmp_path):
    put(tmp_path / "1.safetensors", checkpoint({"a": A}))
    put(tmp_path / INDEX_NAME, index({"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.file == str(tmp_path / INDEX_NAME)
    assert "puts 2 tensors into '2.safetensors', which is not there" in str(caught.value)
    assert "fetch the missing shard" in str(caught.value)


def test_a_hostile_index_opens_nothing_outside(tmp_path):
    put(tmp_path / "secret.safetensors", checkpoint({"a": A}))
    put(tmp_path / "m" / INDEX_NAME, index({"a": "../secret.safetensors"}))
    with pytest.raises(CheckpointError, match="not a file of its directory"):
        open_checkpoint(tmp_path / "m")


def test_an_error_names_the_wrong_shard_among_many(tmp_path):
    for number in range(20):
        put(tmp_path / f"{number}.safetensors", checkpoint({f"t{number}": A}))
    put(tmp_path / "13.safetensors", checkpoint({"t13": A})[:-1])
    before = open_resources()
    with pytest.raises(CheckpointError, match=r"13\.safetensors: the data is cut short"):
        open_checkpoint(tmp_path)
    assert left_open(before) == []


def test_an_empty_list_and_an_unknown_backend_are_refused():
    with pytest.raises(CheckpointError, match="the list of files is empty"):
        open_checkpoint([])
    with pytest.raises(CheckpointError, match=r"no backend 'floppy' \(auto, posix"):
        open_checkpoint("/x", backend="floppy")
    with pytest.raises(CheckpointError, match="files= goes with backend='memory'"):
        open_checkpoint("/x", backend="posix", files={})


def test_a_wrong_device_opens_nothing(tmp_path):
    path = put(tmp_path / "w", checkpoint({"a": A}))
    before = open_resources()
    with pytest.raises(SettingsError, match="device = 'abacus'"):
        open_checkpoint(path, device="abacus")
    assert left_open(before) == []


def test_a_checkpoint_of_no_tensors_is_a_checkpoint(tmp_path):
    path = put(tmp_path / "w", checkpoint({}, {"format": "pt"}))
    assert contents(path) == {}
    with open_checkpoint(path) as opened:
        opened.load_into({})
        assert json.dumps(opened.metadata()) == '{"format": "pt"}'


def test_the_default_device_of_torch_does_not_matter(tmp_path):
    path = put(tmp_path / "w", checkpoint({"a": A, "e": ("F32", [0], b""), "s": entry("F32", [])}))
    with torch.device("meta"), open_checkpoint(path) as opened:
        assert {tensor.device.type for _, tensor in opened.tensors()} == {"cpu"}
        assert opened.get_tensor("a").device.type == opened.get_slice("a")[1:].device.type == "cpu"
        assert opened.get_slice("a")[[2, 0]].device.type == "cpu"


def test_an_option_that_does_not_exist_is_told_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"the arguments of open_checkpoint: .* thread; did you mean threads"):
        open_checkpoint(tmp_path, thread=3)
