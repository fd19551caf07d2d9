"""Hit, partial or miss; and on a miss, which factor differs."""

import logging
from typing import Any

import pytest

from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.packs.manifest import Manifest, PackedFile
from engine_loader.compile_cache.packs.pack import Pack
from engine_loader.compile_cache.packs.scan import LocalFile
from engine_loader.compile_cache.process.job import Job
from engine_loader.compile_cache.process.outcome import Outcome
from engine_loader.compile_cache.process.session import log_save
from engine_loader.compile_cache.stores.interface import Stored
from engine_loader.compile_cache.verdict.explain import nearest_key
from engine_loader.compile_cache.verdict.judge import Verdict, judge
from tests.compile_cache.support import KEY

AOT = "vllm/torch_compile_cache/torch_aot_compile"


def pack(*paths: str, factors: dict[str, Any] | None = None) -> Pack:
    files = tuple(PackedFile(path, 1, 1, 0o644, "0" * 64, 0, 0) for path in paths)
    return Pack(Stored("x/y/z", 1, 1.0), Manifest(KEY, 1.0, files, (), factors=factors or {}))


def local(path: str) -> LocalFile:
    return LocalFile(path, f"/{path}", 1, 1, 1, 0o644)


def test_nothing_in_the_store_is_a_miss_where_something_was_compiled() -> None:
    assert judge([], [local(f"{AOT}/abc/rank_0_0/model")], {}).result == "miss"
    assert judge([], [], {}) == Verdict("")


def test_nothing_compiled_is_a_hit() -> None:
    assert judge([pack(f"{AOT}/abc/rank_0_0/model")], [], {}).result == "hit"
    assert judge([pack(f"{AOT}/abc/rank_0_0/model")], [local("vllm/startup_plan/x.json")], {}).result == "hit"


def test_more_under_the_same_key_is_partial() -> None:
    verdict = judge([pack(f"{AOT}/abc/rank_0_0/model")], [local(f"{AOT}/abc/inductor_cache/ab/k.so")], {})
    assert verdict.result == "partial"


def test_a_miss_names_what_differs() -> None:
    old = {"engine/1/rank_0_0": {"env": {"VLLM_NIXL_SIDE_CHANNEL_PORT": 5600, "A": 1}, "model": "/models/llama"}}
    new = {"engine/2/rank_0_0": {"env": {"VLLM_NIXL_SIDE_CHANNEL_PORT": 5601, "A": 1}, "model": "/models/llama"}}
    verdict = judge([pack(f"{AOT}/abc/rank_0_0/model", factors=old)], [local(f"{AOT}/def/rank_0_0/model")], new)
    assert verdict.result == "miss"
    assert verdict.reasons == ["VLLM_NIXL_SIDE_CHANNEL_PORT was 5600 when this cache was made, is 5601 now"]


def test_vllms_own_account_of_its_key_is_understood() -> None:
    place = "vllm/torch_compile_cache/{}/rank_0_0/backbone/cache_key_factors.json"
    old = {place.format("1111111111"): {"env": {"VLLM_PLUGINS": None}, "config_hash": "a", "code_hash": "c"}}
    new = {place.format("2222222222"): {"env": {"VLLM_PLUGINS": None}, "config_hash": "b", "code_hash": "c"}}
    made = local("vllm/torch_compile_cache/2222222222/rank_0_0/backbone/artifact")
    known = pack("vllm/torch_compile_cache/1111111111/rank_0_0/backbone/artifact", factors=old)
    assert judge([known], [made], new).reasons == ["config_hash was a when this cache was made, is b now"]


def test_of_several_caches_the_nearest_is_compared() -> None:
    far = {"engine/1/rank_0_0": {"env": {"A": 1, "B": 1}}}
    near = {"engine/2/rank_0_0": {"env": {"A": 2, "B": 1}}}
    new = {"engine/3/rank_0_0": {"env": {"A": 2, "B": 2}}}
    packs = [pack(f"{AOT}/a/r/m", factors=far), pack(f"{AOT}/b/r/m", factors=near)]
    assert judge(packs, [local(f"{AOT}/c/r/m")], new).reasons == ["B was 1 when this cache was made, is 2 now"]


GRAPH = "fxgraph/mt/fmtb6nfzzqo4ttpw5ybdzrvvajgm6bgl5zz7vhqpsa4cwbx5fwsb"
CPP_KERNEL = "y3/cy3ja3ntfhpt4iat3cfx2j5eb5t564m667zrlwepm4xjg2w2ldhc"
TRITON = "4XKZHCCMHWWUGYRZTVM2LVJXYAMCWPVZOTNMSZYUPGR7YCMQGN6A"
HASH = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
LEFT = {
    "1 graph of inductor": f"{GRAPH}/ab12cd",
    "1 C++ kernel of inductor": f"{CPP_KERNEL}.main.so",
    "1 Triton kernel (_fwd_kernel)": f"{TRITON}/_fwd_kernel.cubin",
    "1 Triton kernel (__triton_launcher)": f"{TRITON}/__triton_launcher.cpython-312-x86_64-linux-gnu.so",
    "1 JIT kernel of SGLang (rope)": f"cuda_90a/rope/build-{HASH[:32]}/deps-{HASH[:32]}/rope.so",
    "1 FlashInfer kernel (batch_decode)": "0.6.2/90a/cached_ops/batch_decode/batch_decode.so",
    "1 DeepGEMM kernel (fp8_gemm)": f"cache/kernel.fp8_gemm.{HASH[:32]}/kernel.cubin",
    "1 TVM-FFI module (act_and_mul)": f"act_and_mul_{HASH[:16]}/act_and_mul.so",
    "1 TileLang kernel": f"0.1.6/{HASH}/kernel_lib.so",
    "1 CuTe kernel": f"{HASH[:16]}/{HASH}.o",
    "1 kernel of CUDA's driver": "3/b/4f2a9c77d1e02b",
    "1 other library": f"artifacts/router/{HASH[:16]}/router.abi3.so",
}
"""How each is told -> a file that its compiler leaves, below whatever directory it has."""
DIRECTORIES = ("triton", "sglang/triton", "sglang/torch_compile_cache/0a1b2c3d4e/rank_0_0/eagle/inductor_cache")


@pytest.mark.parametrize(("told", "path"), LEFT.items())
@pytest.mark.parametrize("directory", DIRECTORIES)
def test_what_was_compiled_anew_is_told_wherever_an_engine_keeps_it(directory: str, told: str, path: str) -> None:
    cached = pack(f"{directory}/{GRAPH.replace('fmtb', 'other')}/x", f"{directory}/{TRITON.replace('4', 'A')}/act.so")
    verdict = judge([cached], [local(f"{directory}/{path}")], {})
    assert verdict.result == "partial"
    (reason,) = verdict.reasons
    assert reason.startswith(f"{told} compiled anew: ")
    again = judge([pack(f"{directory}/{path}")], [], {})
    assert again == Verdict("hit")


@pytest.mark.parametrize(
    "path",
    [
        f"sglang/triton/{TRITON}/__grp___fwd_kernel.json",
        f"sglang/triton/{TRITON}/_fwd_kernel.ttir",
        "sglang/inductor/bo/cbob53zo376fbao5rlgjlty2uedso5u7qmngjejbqgrkujvxhels.py",
        f"sglang/inductor/{CPP_KERNEL}.main.cpp",
        "sglang/inductor/precompiled_headers/c2wne2o555rbgtohkgbuxoo64pc5rm5kbakdbsm7q6hiphbew3ng.h.gch",
        "sglang/flashinfer/autotune/0.6.2/90a/9f86d081884c7d65/rank_tp0_pp0_dp0.json",
        "sglang/torch_compile_cache/0a1b2c3d4e/rank_0_0/backbone/sglang_compile_cache.py",
        "sglang/nv/index",
    ],
)
def test_sources_and_notes_of_compilers_are_not_compiled_code(path: str) -> None:
    assert judge([pack(f"sglang/triton/{TRITON}/act.cubin")], [local(path)], {}) == Verdict("hit")


def triton(*names: str, key: str) -> list[str]:
    return [f"sglang/triton/{key * 51}{chr(65 + number)}/{name}.cubin" for number, name in enumerate(names)]


def test_as_much_compiled_as_the_cache_has_is_a_miss() -> None:
    verdict = judge([pack(*triton("a", "b", key="A"))], [*map(local, triton("a", "b", key="B"))], {})
    assert verdict == Verdict("miss", ["2 Triton kernels (a, b) compiled anew: the cache has them under other keys"])


def test_what_serves_beside_what_was_compiled_makes_it_partial() -> None:
    cached = pack(*triton("a", "b", "c", key="A"))
    verdict = judge([cached], [local(f"sglang/inductor/{GRAPH}/x"), *map(local, triton("d", key="B"))], {})
    assert verdict.result == "partial"
    assert verdict.reasons == [
        "1 graph of inductor compiled anew: the cache has none",
        "1 Triton kernel (d) compiled anew: the cache has 3 others",
    ]


def test_of_many_names_a_few_are_told() -> None:
    verdict = judge([pack(*triton("a", key="A"))], [*map(local, triton("p", "q", "r", "s", key="B"))], {})
    assert verdict.reasons == ["4 Triton kernels (p, q, r, …) compiled anew: the cache has 1 other"]


def test_the_options_that_differ_are_told_beside_what_was_compiled() -> None:
    old = {"engine/1/rank_0_0_0": {"env": {}, "server_args": {"attention_backend": "triton", "page_size": 1}}}
    new = {"engine/2/rank_0_0_0": {"env": {}, "server_args": {"attention_backend": "fa3", "page_size": 1}}}
    cached = pack(*triton("a", "b", key="A"), factors=old)
    verdict = judge([cached], [*map(local, triton("c", key="B"))], new)
    assert verdict.result == "partial"
    assert verdict.reasons[1:] == ["server_args.attention_backend was triton when this cache was made, is fa3 now"]


def test_a_kernel_beside_vllms_own_key_is_told_and_is_no_hit() -> None:
    cached = pack(f"{AOT}/abc/rank_0_0/model", *triton("a", key="A"))
    verdict = judge([cached], [*map(local, triton("b", "c", key="B"))], {})
    assert verdict == Verdict("partial", ["2 Triton kernels (b, c) compiled anew: the cache has 1 other"])


def test_the_nearest_environment_is_named() -> None:
    here = CacheKey((("torch", "2.13"), ("cc", "9.0"), ("triton", "3.9")), "m")
    others = [
        CacheKey((("torch", "2.12"), ("cc", "8.0"), ("triton", "3.9")), "m"),
        CacheKey((("torch", "2.13"), ("cc", "8.0"), ("triton", "3.9")), "m"),
    ]
    assert nearest_key(here, others) == ["cc was 8.0 when the nearest cache was made, is 9.0 now"]
    assert nearest_key(here, []) == []


@pytest.mark.parametrize(
    ("outcome", "lines"),
    [
        (Outcome("complete", verdict="hit"), ["hit", "nothing new to save"]),
        (
            Outcome("nothing", verdict="partial", reasons=["1 kernel"], notes=["the store is not written to"]),
            ["partial; 1 kernel", "nothing was saved: the store is not written to"],
        ),
        (
            Outcome("nothing", notes=["another process of this node saves"]),
            ["nothing was saved: another process of this node saves"],
        ),
        (Outcome("nothing", messages=["it cannot be signed"]), ["it cannot be signed"]),
        (Outcome("nothing"), ["nothing new to save"]),
    ],
)
def test_the_log_says_nothing_new_only_where_that_is_known(
    caplog: pytest.LogCaptureFixture, outcome: Outcome, lines: list[str]
) -> None:
    log = logging.getLogger("engine_loader.tests")
    caplog.set_level(logging.INFO, log.name)
    log_save(log, Job("save", "torch", KEY, {}), "/store", outcome)
    assert caplog.messages == [f"compile cache: {line}" for line in lines]
