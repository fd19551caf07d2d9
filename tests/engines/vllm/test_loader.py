"""The loader class in vLLM: what it keeps of the default loader, its options, and what it says."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_loader import SettingsError
from tests.support.tiny_models import make_model
from tests.support.vllm_inprocess import differences, load_model, load_state, state_of

pytestmark = pytest.mark.engine


def make_loader(**load_config: Any) -> Any:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return get_model_loader(LoadConfig(load_format="b10_3fs", **load_config))


def source_of(directory: Path, **options: Any) -> Any:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    return DefaultModelLoader.Source(str(directory), revision=None, **options)


def write(path: Path, *names: str) -> dict[str, torch.Tensor]:
    tensors = {name: torch.full((3, 2), float(number)) for number, name in enumerate(names)}
    save_file(tensors, path)
    return tensors


def test_it_is_a_default_loader_and_leaves_the_engines_config_alone() -> None:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    make_loader()
    config = LoadConfig(load_format="b10_3fs", model_loader_extra_config={"threads": 2})
    assert isinstance(get_model_loader(config), DefaultModelLoader)
    assert config.load_format == "b10_3fs"
    assert config.model_loader_extra_config == {"threads": 2}


def test_the_iterator_of_other_loaders_is_vllms_own_again(tmp_path: Path) -> None:
    from vllm.model_executor.model_loader import default_loader, weight_utils

    write(tmp_path / "model.safetensors", "a")
    list(make_loader()._get_weights_iterator(source_of(tmp_path)))
    assert default_loader.safetensors_weights_iterator is weight_utils.safetensors_weights_iterator


def test_files_come_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 9, 2):
        write(tmp_path / f"model-{number}.safetensors", f"t{number}")
    names = [name for name, _ in make_loader()._get_weights_iterator(source_of(tmp_path))]
    assert names == ["t2", "t9", "t10"]


def test_prefixes_and_secondary_weights(tmp_path: Path) -> None:
    first = write(tmp_path / "model.safetensors", "a")
    (tmp_path / "audio").mkdir()
    second = write(tmp_path / "audio" / "model.safetensors", "b")
    model = torch.nn.Module()
    model.secondary_weights = (source_of(tmp_path / "audio", prefix="audio."),)
    weights = dict(make_loader().get_all_weights(SimpleNamespace(model=str(tmp_path), revision=None), model))
    assert weights.keys() == {"a", "audio.b"}
    assert torch.equal(weights["a"], first["a"])
    assert torch.equal(weights["audio.b"], second["b"])


def test_experts_of_other_ranks_are_not_read(tmp_path: Path) -> None:
    names = [f"layers.0.experts.{expert}.w1.weight" for expert in range(4)]
    write(tmp_path / "model.safetensors", *names, "layers.0.gate.weight")
    loader = make_loader()
    loader.local_expert_ids = {1, 2}
    read = {name for name, _ in loader._get_weights_iterator(source_of(tmp_path))}
    assert read == {names[1], names[2], "layers.0.gate.weight"}


def test_a_pattern_override_picks_the_files(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", "a")
    write(tmp_path / "other.safetensors", "b")
    source = source_of(tmp_path, allow_patterns_overrides=["other*.safetensors"])
    assert [name for name, _ in make_loader()._get_weights_iterator(source)] == ["b"]


def test_files_beside_the_index_are_left_out(tmp_path: Path) -> None:
    make_model("llama", tmp_path, shards=2)
    write(tmp_path / "consolidated.safetensors", "tok_embeddings.weight")
    names = [name for name, _ in make_loader()._get_weights_iterator(source_of(tmp_path))]
    assert "tok_embeddings.weight" not in names
    assert "model.embed_tokens.weight" in names


def test_a_hub_id_is_downloaded_with_its_revision_and_ignore_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.model_loader import default_loader

    asked: dict[str, Any] = {}

    def download(model: str, cache: Any, patterns: list[str], revision: str, **options: Any) -> str:
        asked.update(model=model, patterns=patterns, revision=revision, ignored=options["ignore_patterns"])
        return str(tmp_path)

    write(tmp_path / "model.safetensors", "a")
    monkeypatch.setattr(default_loader, "download_weights_from_hf", download)
    source = source_of(Path("org/model"))
    source.revision = "v2"
    loader = make_loader(ignore_patterns=["original/*"])
    assert [name for name, _ in loader._get_weights_iterator(source)] == ["a"]
    assert asked == {
        "model": "org/model",
        "patterns": ["*.safetensors"],
        "revision": "v2",
        "ignored": ["original/*"],
    }


def test_torchao_checkpoints_go_to_vllms_own_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.model_loader import default_loader

    write(tmp_path / "model.safetensors", "a")
    monkeypatch.setattr(default_loader, "safetensors_weights_iterator", lambda *_, **__: iter([("theirs", None)]))
    loader = make_loader()
    loader.load_config.safetensors_load_strategy = "torchao"
    assert [name for name, _ in loader._get_weights_iterator(source_of(tmp_path))] == ["theirs"]


def test_a_parameter_that_the_checkpoint_does_not_have_is_an_error(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        load_model(model, "b10_3fs")
    load_model(model, "b10_3fs", {"enable_weights_track": False})


def test_weights_are_reloaded_by_a_fresh_loader_without_load_weights(tmp_path: Path) -> None:
    """That is how vLLM's reload_weights works. (Its own entry fails on CPU for every load format: kernels repack
    there.)"""
    directory = make_model("llama", tmp_path)
    model = load_model(directory, "b10_3fs")
    expected = state_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    weights = make_loader().get_all_weights(SimpleNamespace(model=str(directory), revision=None), model)
    model.load_weights(weights)
    assert differences(expected, state_of(model)) == []


@pytest.mark.parametrize(
    ("extra_config", "message"),
    [
        ({"thread": 2}, "did you mean .*threads.*block_bytes"),
        ({"threads": 0}, "threads = 0: .*greater than or equal to 1"),
        ({"buffer_bytes": "lots"}, "buffer_bytes = 'lots'"),
        ({"engine": "rust"}, "engine = 'rust': .*'cpp'"),
        ({"num_threads": 4}, "set threads"),
        ({"enable_multithread_load": True}, "set threads"),
    ],
)
def test_a_bad_option_is_an_error_that_says_what_is_valid(extra_config: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=f"(?s)--model-loader-extra-config.*{message}"):
        make_loader(model_loader_extra_config=extra_config)


def test_options_come_from_yaml_and_environment_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "engine-loader.yaml"
    config.write_text("loader:\n  threads: 3\n  block_bytes: 1MiB\n  max_tries: 7\n")
    monkeypatch.setenv("ENGINE_LOADER_CONFIG", str(config))
    monkeypatch.setenv("ENGINE_LOADER_LOADER__BLOCK_BYTES", "2MiB")
    monkeypatch.setenv("ENGINE_LOADER_LOADER__MAX_TRIES", "8")
    settings = make_loader(model_loader_extra_config={"max_tries": 9})._reader_settings
    assert (settings.threads, settings.block_bytes, settings.max_tries) == (3, 2 << 20, 9)


def test_one_line_tells_what_was_loaded(tmp_path: Path, vllm_log: pytest.LogCaptureFixture) -> None:
    model = make_model("llama", tmp_path, shards=2)
    load_state(model, "b10_3fs")
    lines = [record.getMessage() for record in vllm_log.records if "b10_3fs: loaded" in record.getMessage()]
    assert len(lines) == 1
    assert " 2 files" in lines[0]
    assert "GB/s, from posix" in lines[0]
    assert "peak buffers" in lines[0]


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bar_obeys_the_engine(shown: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "model.safetensors", "a", "b")
    list(make_loader(use_tqdm_on_load=shown)._get_weights_iterator(source_of(tmp_path)))
    assert ("100% Completed" in capfd.readouterr().err) is shown


def test_other_ranks_show_no_bar_and_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], vllm_log: Any
) -> None:
    write(tmp_path / "model.safetensors", "a")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    list(make_loader()._get_weights_iterator(source_of(tmp_path)))
    assert "Completed" not in capfd.readouterr().err
    assert not [record for record in vllm_log.records if "b10_3fs: loaded" in record.getMessage()]


def test_a_draft_model_is_loaded_by_one_rank_alone(tmp_path: Path) -> None:
    """Drafts live on one pipeline stage: loading must not wait for ranks that load nothing."""
    write(tmp_path / "model.safetensors", "a", "b")
    torch.multiprocessing.spawn(_load_on_the_last_rank, (tmp_path,), nprocs=2)
    assert (tmp_path / "loaded").read_text() == "a b"


def _load_on_the_last_rank(rank: int, directory: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{directory}/store", world_size=2, rank=rank)
    if rank == 1:
        names = [name for name, _ in make_loader()._get_weights_iterator(source_of(directory))]
        (directory / "loaded").write_text(" ".join(names))
    else:
        while not (directory / "loaded").exists():
            time.sleep(0.05)
