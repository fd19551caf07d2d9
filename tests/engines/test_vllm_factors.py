"""What is kept of vLLM's key for a person must hold no secret."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from engine_loader.engines.vllm.cache import key_factors


@pytest.mark.parametrize("version", ["new", "old"])
def test_secrets_are_left_out(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"VLLM_PLUGINS": "b10_3fs", "VLLM_API_KEY": "hunter2", "VLLM_X_TOKEN": "hunter2"}
    envs = SimpleNamespace(**({"compile_factors": lambda: named} if version == "new" else {}))
    vllm = ModuleType("vllm")
    vllm.envs = envs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    config = SimpleNamespace(model_config=SimpleNamespace(model="/models/llama", compute_hash=lambda: "abc"))
    factors = key_factors(config)
    assert factors["env"]["VLLM_PLUGINS"] == "b10_3fs"
    assert factors["config"] == {"model_config": "abc"}
    assert "hunter2" not in str(factors)
