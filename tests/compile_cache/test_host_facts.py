"""Facts of a host: what compiled code depends on makes a difference, and nothing else does."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine_loader.compile_cache.host import groups, tools
from engine_loader.compile_cache.host.groups import this_host
from engine_loader.compile_cache.host.instructions import describe
from engine_loader.compile_cache.host.threads import threads
from engine_loader.compile_cache.host.versions import python_version
from tests.compile_cache.processors import GENOA, GRAVITON3, SAPPHIRE_RAPIDS, SAPPHIRE_RAPIDS_GUEST, cpuinfo

Fake = Callable[[str, str], Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Makes a program in PATH that prints a text for --version."""
    for variable in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(name: str, text: str) -> Path:
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\n[ \"$1\" = --version ] || exit 1\ncat <<'END'\n{text}\nEND\n")
        program.chmod(0o755)
        return program

    return make


def forget() -> None:
    for function in (tools.cxx_compiler, tools.cuda_tool, groups.this_host):
        function.cache_clear()


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> Iterator[None]:
    forget()
    yield
    forget()


def test_processors_with_other_vectors_differ() -> None:
    assert describe(SAPPHIRE_RAPIDS).startswith("amx_tile+")
    assert describe(GENOA).startswith("avx512f+")
    assert describe(SAPPHIRE_RAPIDS) != describe(GENOA)


def test_what_a_hypervisor_hides_makes_no_difference() -> None:
    assert describe(SAPPHIRE_RAPIDS_GUEST) == describe(SAPPHIRE_RAPIDS)


@pytest.mark.parametrize("flag", ["smep", "fpu", "fsrm", "pse36", "smap", "sgx", "svm", "fxsr", "avic", "sep"])
def test_flags_of_the_kernel_make_no_difference(flag: str) -> None:
    with_it, without = cpuinfo(f"sse2 avx2 {flag}"), cpuinfo("sse2 avx2")
    assert describe(with_it) == describe(without)


@pytest.mark.parametrize("flag", ["fma", "bmi2", "f16c", "avx512_fp16", "amx_int8", "sse4a", "avx_vnni", "gfni"])
def test_instructions_that_compilers_generate_make_a_difference(flag: str) -> None:
    assert describe(cpuinfo(f"sse2 avx2 {flag}")) != describe(cpuinfo("sse2 avx2"))


def test_the_order_of_flags_makes_no_difference() -> None:
    assert describe(cpuinfo("avx2 sse2 fma")) == describe(cpuinfo("fma sse2 avx2"))


def test_arm_counts_its_vector_length() -> None:
    assert describe(GRAVITON3, "32").startswith("sve+")
    assert describe(GRAVITON3, "32") != describe(GRAVITON3, "16")
    assert describe(SAPPHIRE_RAPIDS, "32") == describe(SAPPHIRE_RAPIDS)


def test_other_processors_are_told_apart_by_their_names() -> None:
    power9, power10 = "processor\t: 0\ncpu\t\t: POWER9, altivec supported\n", "cpu\t\t: POWER10\n"
    assert describe(power9) != describe(power10)
    assert describe("nothing to see\n") == "unknown"


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("g++ (Debian 12.2.0-14+deb12u1) 12.2.0\nCopyright (C)", "gcc-12.2.0"),
        ("g++-13 (Ubuntu 13.3.0-6ubuntu2~24.04) 13.3.0", "gcc-13.3.0"),
        ("gcc (GCC) 11.4.1 20231218 (Red Hat 11.4.1-3)", "gcc-11.4.1"),
        ("Ubuntu clang version 18.1.3 (1ubuntu1)", "clang-18.1.3"),
    ],
)
def test_the_compiler_is_its_kind_and_version(fake: Fake, said: str, version: str) -> None:
    fake("g++", said)
    assert tools.cxx_compiler() == version


def test_the_path_of_the_compiler_makes_no_difference(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("elsewhere/x86_64-linux-gnu-g++-12", "x86_64-linux-gnu-g++-12 (Debian 12.2.0-14) 12.2.0")
    monkeypatch.setenv("CXX", str(tmp_path / "elsewhere/x86_64-linux-gnu-g++-12"))
    assert tools.cxx_compiler() == "gcc-12.2.0"


def test_a_host_without_a_compiler_says_so(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert tools.cxx_compiler() == "none"


def test_the_cuda_toolkit_of_cuda_home_counts(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("nvcc", "Cuda compilation tools, release 12.8, V12.8.93\nBuild cuda_12.8.r12.8/compiler.1")
    assert tools.cuda_tool("nvcc") == "12.8.93"
    forget()
    fake("cuda-13/bin/nvcc", "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.48")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda-13"))
    assert tools.cuda_tool("nvcc") == "13.0.48"


def test_libstdcxx_is_the_one_that_the_loader_finds_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libstdc++.so.6.0.33").touch()
    os.symlink("libstdc++.so.6.0.33", tmp_path / "libstdc++.so.6")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/no/such/directory:{tmp_path}")
    assert tools.cxx_library() == "6.0.33"


def test_a_new_toolkit_leaves_what_the_cxx_compiler_made(fake: Fake) -> None:
    fake("g++", "g++ 12.2.0")
    fake("nvcc", "V12.8.93")
    before = this_host()
    forget()
    fake("nvcc", "V13.0.48")
    after = this_host()
    assert after["native"] == before["native"]
    assert after["toolkit"].differs_from(before["toolkit"]) == ["nvcc was 12.8.93 there, is 13.0.48 here"]


def test_the_groups_name_all_that_host_code_depends_on() -> None:
    assert this_host()["native"].names == ("isa", "cxx", "libc", "libstdcxx")
    assert this_host()["toolkit"].names == ("isa", "cxx", "libc", "libstdcxx", "nvcc", "ptxas", "driver")
    assert dict(this_host()["native"].parts)["libc"] == "-".join(str(os.confstr("CS_GNU_LIBC_VERSION")).split())


@pytest.mark.parametrize(
    ("bound", "count"),
    [
        ("0-31", "32"),
        ("32-63", "32"),
        ("0-15|16-31", "16"),
        ("0-3|8,10,12-13", "4"),
        ("0-7|8-11", "8+4"),
        ("1,1,1-2", "2"),
    ],
)
def test_what_counts_of_a_thread_binding_is_the_number(bound: str, count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("VLLM_CPU_OMP_THREADS_BIND", "SGLANG_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv("OMP_NUM_THREADS", "99")
        monkeypatch.setenv(variable, bound)
        assert threads() == count
        monkeypatch.delenv(variable)


@pytest.mark.parametrize("bound", ["auto", "nobind", "", "all", "0-x"])
def test_without_a_list_of_processors_openmp_is_asked(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bound)
    monkeypatch.setenv("OMP_NUM_THREADS", "12,2")
    assert threads() == "12"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads() == str(len(os.sched_getaffinity(0)))


def test_pythons_patch_level_makes_no_difference() -> None:
    assert python_version().count(".") == 1
