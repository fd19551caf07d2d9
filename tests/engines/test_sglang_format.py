"""What SGLang loads past this package is refused before a process is started, with what to do instead."""

from types import SimpleNamespace
from typing import Any

import pytest

from engine_loader.engines.sglang.format import check
from engine_loader.errors import SettingsError


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
    ],
)
def test_what_has_a_loader_of_its_own_is_refused(option: str, value: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        check(arguments(**{option: value}))


def test_with_another_load_format_nothing_is_refused() -> None:
    check(arguments(load_format="auto", quantization="gguf", modelopt_quant="fp8", weight_cache_mode="client"))
