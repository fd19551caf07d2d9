"""What the cache was good for to SGLang, from a restore to the save behind it, on directories as SGLang leaves them."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine_loader.compile_cache.directories import directories_of
from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.process.job import Job
from engine_loader.compile_cache.process.operations import perform
from engine_loader.compile_cache.process.outcome import Outcome
from engine_loader.compile_cache.process.use import note_use
from engine_loader.compile_cache.verdict.explain import account
from engine_loader.engines.sglang.cache import key_factors
from engine_loader.settings import CompileCacheSettings

KEY = CacheKey((("sglang", "0.5.23"), ("torch", "2.13.0"), ("cc", "9.0")), "llama_tp1_pp1_dp1")
NEWER = {
    "TRITON_CACHE_DIR": "sglang/triton",
    "TORCHINDUCTOR_CACHE_DIR": "sglang/inductor",
    "CUDA_CACHE_PATH": "sglang/nv",
    "TILELANG_CACHE_DIR": "sglang/tilelang",
    "FLASHINFER_WORKSPACE_BASE": "sglang",
    "SGLANG_DG_CACHE_DIR": "sglang/deep_gemm",
    "SGLANG_CACHE_DIR": "sglang",
    "SGLANG_JIT_CACHE_DIR": "sglang-jit",
}
"""Where SGLang has had its compilers keep what they make from about 0.5.18; below, before that."""
OLDER = {name: f"{name.lower()}" for name in NEWER}

FWD = "A" * 52
ACT = "B" * 52
COMPILED = {
    "TRITON_CACHE_DIR": [f"{FWD}/_fwd_kernel.cubin", f"{FWD}/__grp___fwd_kernel.json", f"{ACT}/act_and_mul.cubin"],
    "TORCHINDUCTOR_CACHE_DIR": ["fxgraph/mt/fmtb6nfz/ab12", "y3/cy3ja3ntfhpt4iat3cfx2j5eb5t564m667zrlwepm4xjg2w.py"],
    "FLASHINFER_WORKSPACE_BASE": [".cache/flashinfer/0.6.2/90a/cached_ops/batch_decode/batch_decode.so"],
    "SGLANG_DG_CACHE_DIR": ["cache/kernel.fp8_gemm.0123456789abcdef/kernel.cubin"],
    "SGLANG_JIT_CACHE_DIR": ["cuda_90a/rope/build-01/deps-02/rope.so"],
}


class Machine:
    """One that starts SGLang, and shares no more than the store with the others."""

    def __init__(self, directory: Path, layout: Mapping[str, str], store: Path) -> None:
        self.environ = {name: str(directory / place) for name, place in layout.items()}
        self.settings = CompileCacheSettings(directory=str(store), trust="anyone")

    def start(self, compiled: Mapping[str, list[str]], **options: Any) -> Outcome:
        """A start in which this was compiled; what the save behind it found out."""
        since_ns = time.time_ns()
        directories = {name: str(path) for name, path in directories_of("sglang", self.environ).items()}
        restored = perform(Job("restore", "sglang", KEY, directories), self.settings)
        assert not restored.messages
        for variable, paths in compiled.items():
            for path in paths:
                file = Path(self.environ[variable], path)
                assert not file.exists()
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(path.encode())
        note_use(Path(directories["sglang"]), "rank_0_0_0", (), key_factors(SimpleNamespace(**options)))
        return perform(Job("save", "sglang", KEY, directories, since_ns=since_ns), self.settings)


@pytest.fixture(params=["newer", "older"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Machine]:
    layout = NEWER if request.param == "newer" else OLDER
    return lambda name: Machine(tmp_path / name, layout, tmp_path / "store")


def test_what_was_restored_and_served_is_a_hit(machine: Callable[[str], Machine]) -> None:
    cold = machine("one").start(COMPILED)
    assert (cold.verdict, cold.reasons) == ("miss", ["the store had nothing for this environment and scope"])
    assert cold.files == sum(map(len, COMPILED.values()))
    restored = machine("two").start({})
    assert (restored.verdict, restored.reasons) == ("hit", [])
    assert restored.status == "complete"


def test_a_cache_that_was_never_wiped_is_a_hit_too(machine: Callable[[str], Machine]) -> None:
    machine("one").start(COMPILED)
    again = machine("one").start({})
    assert (again.verdict, again.reasons) == ("hit", [])


def test_what_was_compiled_after_the_restore_is_told_with_the_option_that_differs(
    machine: Callable[[str], Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("one").start(COMPILED, attention_backend="triton", chunked_prefill_size=8192)
    fresh = machine("two")
    more = {
        "TRITON_CACHE_DIR": [f"{'C' * 52}/_fwd_kernel.cubin"],
        "SGLANG_DG_CACHE_DIR": ["cache/kernel.fp8_gemm.fedcba9876543210/kernel.cubin"],
    }
    start = fresh.start(more, attention_backend="triton", chunked_prefill_size=4096)
    assert start.verdict == "partial"
    assert sorted(start.reasons) == [
        "1 DeepGEMM kernel (fp8_gemm) compiled anew: the cache has it under another key",
        "1 Triton kernel (_fwd_kernel) compiled anew: the cache has it under another key",
        "server_args.chunked_prefill_size was 8192 when this cache was made, is 4096 now",
    ]
    for name, value in fresh.environ.items():
        monkeypatch.setenv(name, value)
    last = account("sglang", fresh.settings, KEY)["last"]
    assert (last["verdict"], last["reasons"]) == (start.verdict, start.reasons), "explain does not say the same"
    assert machine("three").start({}, chunked_prefill_size=4096).verdict == "hit"


def test_a_cache_of_which_nothing_serves_is_a_miss(machine: Callable[[str], Machine]) -> None:
    machine("one").start(COMPILED)
    others = {
        "TRITON_CACHE_DIR": [f"{'C' * 52}/_fwd_kernel.cubin", f"{'D' * 52}/act_and_mul.cubin"],
        "TORCHINDUCTOR_CACHE_DIR": ["fxgraph/xy/fxyz/ab12"],
        "FLASHINFER_WORKSPACE_BASE": [".cache/flashinfer/0.6.2/90a/cached_ops/batch_prefill/batch_prefill.so"],
        "SGLANG_DG_CACHE_DIR": ["cache/kernel.fp8_gemm.fedcba9876543210/kernel.cubin"],
        "SGLANG_JIT_CACHE_DIR": ["cuda_90a/rope/build-01/deps-03/rope.so"],
    }
    start = machine("two").start(others)
    assert start.verdict == "miss"
    assert "1 graph of inductor compiled anew: the cache has 1 other" in start.reasons
    assert len(start.reasons) == len(others)


def test_where_nothing_is_compiled_an_empty_store_is_no_miss(machine: Callable[[str], Machine]) -> None:
    start = machine("one").start({})
    assert (start.verdict, start.reasons, start.status) == ("", [], "nothing")


def test_options_that_are_secret_or_shape_no_kernel_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Struct:  # as newer versions have it: no __dict__
        __slots__ = __struct_fields__ = ("dtype", "api_key", "port", "lora_backend", "moe_extra_config", "enable_list")

        def __init__(self, *values: Any) -> None:
            for name, value in zip(self.__slots__, values, strict=True):
                setattr(self, name, value)

    monkeypatch.setenv("SGLANG_API_KEY", "hunter2")
    monkeypatch.setenv("SGLANG_ENABLE_JIT_DEEPGEMM", "1")
    monkeypatch.setenv("SGLANG_RUN_ID", "of this start")
    kept = key_factors(Struct("bfloat16", "hunter2", 30000, "csgmv", '{"secret": "hunter2"}', [1, 2]))
    assert kept["server_args"] == {"dtype": "bfloat16", "lora_backend": "csgmv", "enable_list": [1, 2]}
    assert kept["env"]["SGLANG_ENABLE_JIT_DEEPGEMM"] == "1"
    assert "hunter2" not in str(kept)
    assert "of this start" not in str(kept)
