"""Which directories are cached, which of their files are left out, and which hold code for the host's processor."""

import tempfile
from pathlib import Path

import pytest

from engine_loader.compile_cache.directories import ENGINES, depends_on, directories_of

NAMED = {
    "humming": "HUMMING_CACHE_DIR",
    "b12x": "B12X_COMPILE_CACHE_DIR",
    "minfer_fmha": "MINFER_FMHA_CACHE_DIR",
    "minfer_sparse": "MM_SPARSE_ATTN_AOT_CACHE",
    "torch_extensions": "TORCH_EXTENSIONS_DIR",
    "flash_attention": "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR",
    "quack": "QUACK_CACHE_DIR",
    "flydsl": "FLYDSL_RUNTIME_CACHE_DIR",
    "cute_dsl": "CUTE_DSL_CACHE_DIR",
}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_each_cache_is_where_its_variable_says(engine: str, tmp_path: Path) -> None:
    environ = {variable: str(tmp_path / name) for name, variable in NAMED.items()}
    found = directories_of(engine, environ)
    assert {name: found[name] for name in NAMED} == {name: tmp_path / name for name in NAMED}


def test_defaults_are_those_of_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "me")
    monkeypatch.delenv("LOGNAME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    found = directories_of("vllm", {"XDG_CACHE_HOME": "/xdg"})
    mine = Path(tempfile.gettempdir(), "me")
    assert {name: found[name] for name in NAMED} == {
        "humming": Path("/home/me/.humming/cache"),
        "b12x": Path("/xdg/b12x/compile"),
        "minfer_fmha": Path("/home/me/.cache/minfer/fmha_sm100"),
        "minfer_sparse": Path("/home/me/.cache/minfer/mm_sparse_attn"),
        "torch_extensions": Path("/xdg/torch_extensions"),
        "flash_attention": mine / "flash_attention_cute_dsl_cache",
        "quack": mine / "quack_cache",
        "flydsl": Path("/home/me/.flydsl/cache"),
        "cute_dsl": Path("/xdg/cute_dsl"),
    }


def test_flashinfers_tables_have_a_directory_of_their_own_only_where_it_is_named(tmp_path: Path) -> None:
    assert "flashinfer_autotune" not in directories_of("vllm", {})
    named = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm"), "VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR": str(tmp_path / "tables")}
    assert directories_of("vllm", named)["flashinfer_autotune"] == tmp_path / "tables"
    inside = named | {"VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR": str(tmp_path / "vllm/tables")}
    assert "flashinfer_autotune" not in directories_of("vllm", inside), "it would be packed twice"


@pytest.mark.parametrize(
    "path",
    [
        "rust_extensions/targets/0a/release/build/x.o",
        "flashinfer/autotune/0.4.0/sm100/0a/rank_tp0_pp0_dp0_gpuGPU-3fa2b1c0-1111-2222-3333-444455556666.json",
        "flashinfer/autotune/0.4.0/sm100/0a/runs/rank_tp0_pp0_dp0.20260101_000000.0a.json",
    ],
)
def test_what_holds_for_one_machine_stays_there(path: str) -> None:
    assert not ENGINES["sglang"][0].takes(path)


@pytest.mark.parametrize(
    "path",
    [
        "rust_extensions/artifacts/0a/_tree.so",
        "flashinfer/autotune/0.4.0/sm100/0a/rank_tp0_pp0_dp0.json",
        "triton/KEY/kernel_gpu0.json",
    ],
)
def test_what_holds_for_more_is_taken(path: str) -> None:
    assert ENGINES["sglang"][0].takes(path)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("inductor/ab/cabc.so", "native"),
        ("inductor/fxgraph/ab/fabc/kernel", "native"),
        ("inductor/triton/0/KEY/kernel.cubin", "any"),
        ("triton/KEY/kernel.cubin", "any"),
        ("triton/KEY/__grp__kernel.json", "any"),
        ("triton/KEY/__triton_launcher.cpython-312-x86_64-linux-gnu.so", "native"),
        ("vllm/torch_compile_cache/torch_aot_compile/0a/rank_0_0/model", "native"),
        ("vllm/torch_compile_cache/0a/rank_0_0/backbone/triton_cache/KEY/kernel.cubin", "any"),
        ("vllm/flashinfer_autotune_cache/0.4/90a/0a/autotune_configs_dp0_rank0.json", "any"),
        ("vllm/modelinfos/llama.json", "any"),
        ("vllm/deep_gemm/cache/kernel.x.0a/kernel.cubin", "any"),
        ("flashinfer/0.4.0/90a/cached_ops/page/page.so", "toolkit"),
        ("flashinfer/0.4.0/90a/cached_ops/page/build.ninja", "toolkit"),
        ("flashinfer/cubins/fmha.cubin", "any"),
        ("deep_gemm/cache/kernel.x.0a/kernel.cubin", "any"),
        ("torch_extensions/py312_cu130/mine/mine.so", "toolkit"),
        ("b12x/0a/0abc.o", "toolkit"),
        ("humming/0a/kernel.cubin", "any"),
        ("humming/launcher/launcher.so", "toolkit"),
        ("cuda/0/a/0123", "any"),
        ("sglang/triton/KEY/kernel.cubin", "any"),
        ("sglang/inductor/ab/cabc.so", "native"),
        ("sglang/flashinfer/.cache/flashinfer/0.4/90a/cached_ops/page/page.so", "toolkit"),
        ("sglang/rust_extensions/artifacts/0a/_tree.so", "toolkit"),
        ("of-no-cache/x.so", "any"),
    ],
)
def test_files_say_whether_they_hold_host_code(path: str, code: str) -> None:
    assert depends_on(path) == code
