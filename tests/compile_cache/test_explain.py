"""Hit, partial or miss; and on a miss, which factor differs."""

from typing import Any

from engine_loader.compile_cache.explain import judge, nearest_key
from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.manifest import Manifest, PackedFile
from engine_loader.compile_cache.pack import Pack
from engine_loader.compile_cache.scan import LocalFile
from engine_loader.compile_cache.store import Stored
from tests.compile_cache.support import KEY

AOT = "vllm/torch_compile_cache/torch_aot_compile"


def pack(*paths: str, factors: dict[str, Any] | None = None) -> Pack:
    files = tuple(PackedFile(path, 1, 1, 0o644, "0" * 64, 0, 0) for path in paths)
    return Pack(Stored("x/y/z", 1, 1.0), Manifest(KEY, 1.0, files, (), factors=factors or {}))


def local(path: str) -> LocalFile:
    return LocalFile(path, f"/{path}", 1, 1, 1, 0o644)


def test_nothing_in_the_store_is_a_miss() -> None:
    assert judge([], [], {}).result == "miss"


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


def test_the_nearest_environment_is_named() -> None:
    here = CacheKey((("torch", "2.13"), ("cc", "9.0"), ("triton", "3.9")), "m")
    others = [
        CacheKey((("torch", "2.12"), ("cc", "8.0"), ("triton", "3.9")), "m"),
        CacheKey((("torch", "2.13"), ("cc", "8.0"), ("triton", "3.9")), "m"),
    ]
    assert nearest_key(here, others) == ["cc was 8.0 when the nearest cache was made, is 9.0 now"]
    assert nearest_key(here, []) == []
