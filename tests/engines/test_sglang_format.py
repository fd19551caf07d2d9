"""What SGLang loads past this package is refused before a process is started, with what to do instead."""

from types import SimpleNamespace
from typing import Any

import pytest

from engine_loader.engines.sglang.format import _from_cli_args, check
from engine_loader.engines.sglang.masks import mask_of
from engine_loader.errors import CheckpointError, SettingsError


def arguments(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"load_format": "b10_3fs", "quantization": None, "modelopt_quant": None, **changes})


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("quantization", "bitsandbytes", "has a loader of its own for the quantisation bitsandbytes"),
        ("quantization", "gguf", "has a loader of its own for the quantisation gguf"),
        ("quantization", "auto-round-int8", "has a loader of its own for the quantisation auto-round-int8"),
        ("modelopt_quant", "fp8", "quantises the model by ModelOpt while it loads it"),
        ("weight_cache_mode", "daemon", "--weight-cache-mode daemon exclude each other"),
        ("startup_weight_load_mode", "overlap", "--startup-weight-load-mode overlap exclude each other"),
    ],
)
def test_what_has_a_loader_of_its_own_is_refused(option: str, value: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        check(arguments(**{option: value}))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ('{"threads": 3', "--model-loader-extra-config is no JSON"),
        ("[3]", "must be a JSON object, not list"),
        ('{"num_threads": 3}', "num_threads is for SGLang's own reader; here, set threads"),
    ],
)
def test_options_that_cannot_be_are_told_before_a_process_is_started(given: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        check(arguments(model_loader_extra_config=given))


def test_a_url_in_capitals_is_an_error() -> None:
    """SGLang takes it for a URL."""
    given = arguments(model_path="S3://models/llama", model_loader_extra_config="{}")
    with pytest.raises(CheckpointError, match=r"S3://models/llama.*write s3://bucket/key"):
        _from_cli_args(lambda *_: None, None, given)


def test_with_another_load_format_nothing_is_refused() -> None:
    check(arguments(load_format="auto", quantization="gguf", modelopt_quant="fp8", weight_cache_mode="client"))


@pytest.mark.parametrize(
    ("model", "names", "mask"),
    [
        ("/m/llama", ["config.json", "model-00001-of-00002.safetensors"], "auto"),
        ("/m/mistral-7b", ["config.json", "params.json", "model.safetensors", "consolidated.safetensors"], "auto"),
        ("/m/mixtral", ["params.json", "consolidated-00001.safetensors"], "mistral"),
        (
            "/m/Mistral-Large-3",
            ["config.json", "params.json", "model.safetensors", "consolidated.safetensors"],
            "mistral",
        ),
        ("/m/Mistral-Large-3", ["config.json", "model.safetensors"], "auto"),
        ("/m/llama", ["consolidated.safetensors", "._model.safetensors"], "mistral"),  # hidden files are no weights
        ("/m/old", ["config.json", "pytorch_model.bin"], "auto"),
        ("org/name", [], "auto"),
    ],
)
def test_the_files_are_those_that_sglang_would_take(model: str, names: list[str], mask: str) -> None:
    assert mask_of(model, names) == mask
