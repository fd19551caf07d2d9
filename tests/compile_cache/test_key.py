"""The key: readable, and different where a cache of one machine would be wrong on another."""

import os

import pytest

from engine_loader.compile_cache import gpu, key
from engine_loader.compile_cache.gpu import Gpu
from engine_loader.compile_cache.key import CacheKey, environment_key, scope_name


@pytest.fixture
def h100s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key, "visible_gpus", lambda: [Gpu("NVIDIA H100 80GB HBM3", "9.0")] * 8)
    monkeypatch.setattr(key, "torch_versions", lambda: {"torch": "2.13.0+cu130", "cuda": "13.0", "hip": ""})


def test_a_gpu_environment_reads_like_its_parts(h100s: None) -> None:
    made = environment_key({"vllm": "0.32.0"}, "llama_tp2", devices=2)
    assert made.environment.startswith("vllm-0.32.0_torch-2.13.0+cu130_python-")
    assert "_cuda-13.0_cc-9.0_gpu-NVIDIA-H100-80GB-HBM3_devices-2_triton-" in made.environment
    assert made.prefix == f"{made.environment}_{made.hash}/llama_tp2"


def test_the_number_of_devices_is_in_the_key(h100s: None) -> None:
    assert environment_key({}, "m", devices=1).hash != environment_key({}, "m", devices=2).hash


def test_a_cpu_environment_names_what_is_compiled_into_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key, "visible_gpus", list)
    names = [name for name, _ in environment_key({}, "m").parts]
    assert names == ["torch", "python", "cpu", "isa", "cxx", "libc", "libstdcxx", "threads", "triton"]


def test_a_cpu_key_has_the_facts_of_the_host_and_a_gpu_key_keeps_them_apart(
    h100s: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_key = environment_key({}, "m")
    assert not {"isa", "cxx", "libc", "libstdcxx", "nvcc", "driver"} & {name for name, _ in gpu_key.parts}
    assert set(gpu_key.host_groups) == {"native", "toolkit"}
    monkeypatch.setattr(key, "visible_gpus", list)
    assert environment_key({}, "m").host_groups == {}


@pytest.mark.parametrize("bound", ["0-3", "4-7", "8,9,10,11", "0-3|4-7"])
def test_engines_bound_to_other_processors_share_a_key(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key, "visible_gpus", list)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bound)
    assert dict(environment_key({}, "m").parts)["threads"] == "4"


def test_another_number_of_threads_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key, "visible_gpus", list)
    one = environment_key({}, "m")
    monkeypatch.setenv("OMP_NUM_THREADS", "37")
    assert environment_key({}, "m").differs_from(one) == [("threads", "37", dict(one.parts)["threads"])]


def test_a_scope_is_one_part_of_a_path() -> None:
    assert scope_name("llama-3_tp1") == "llama-3_tp1"
    for odd in ("../../etc", "a/b", "", "ü" * 300, "."):
        made = scope_name(odd)
        assert "/" not in made and made not in ("", ".", "..") and len(made) < 130
    assert scope_name("a/b") != scope_name("a-b")


def test_a_key_survives_json() -> None:
    one = CacheKey((("torch", "2.13.0"), ("cuda", "13.0")), "all")
    assert CacheKey.from_json(one.to_json()) == one


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, "abc"), ("1", "b"), ("2,0", "ca"), ("", ""), ("GPU-bb", "b"), ("7,0", ""), ("0,x,1", "a")],
)
def test_only_the_visible_gpus_count(visible: str | None, names: str) -> None:
    gpus = [Gpu(name, "9.0", f"GPU-{name * 4}") for name in "abc"]
    assert "".join(one.name for one in gpu._filtered(gpus, visible)) == names


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_a_machine_without_gpus_has_none() -> None:
    assert gpu.visible_gpus() == []
