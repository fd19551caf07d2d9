"""A fleet with one kind of GPU and two kinds of processors: GPU kernels are shared, host libraries are not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine_loader.compile_cache import key
from engine_loader.compile_cache.cache_errors import CacheValidationError
from engine_loader.compile_cache.compaction import compact
from engine_loader.compile_cache.host.groups import HostGroup, HostGroups
from engine_loader.compile_cache.host.instructions import describe
from engine_loader.compile_cache.key import CacheKey
from engine_loader.compile_cache.packs.key_packs import read_packs
from engine_loader.compile_cache.packs.manifest import Manifest
from tests.compile_cache.processors import GENOA, SAPPHIRE_RAPIDS
from tests.compile_cache.support import KEY, SECRET, Machine

LIBRARY = "inductor/ab/cabc.so"
LAUNCHER = "triton/KEY/__triton_launcher.so"
KERNEL = "triton/KEY/kernel.cubin"
CPU_KEY = CacheKey((("torch", "2.13.0"), ("cpu", "x86_64"), ("isa", "avx2+1234")), "model_tp1")


def host(cpuinfo: str, nvcc: str = "13.0.48") -> HostGroups:
    native = {"isa": describe(cpuinfo), "cxx": "gcc-12.2.0"}
    return {"native": HostGroup.of(native), "toolkit": HostGroup.of(native | {"nvcc": nvcc})}


INTEL, AMD = host(SAPPHIRE_RAPIDS), host(GENOA)
On = Callable[[HostGroups], None]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> On:
    """Makes this machine one with the given facts."""
    return lambda groups: monkeypatch.setattr(key, "this_host", lambda: groups)


@pytest.fixture
def fresh(tmp_path: Path, store: Path, on: On) -> Callable[[], Machine]:
    """Makes a fresh node, with the same directories as the others; the store has what one of Intel's compiled."""
    on(INTEL)

    def make() -> Machine:
        shutil.rmtree(tmp_path / "node", ignore_errors=True)
        return Machine(tmp_path / "node", store)

    compiling = make()
    for path in (LIBRARY, LAUNCHER, KERNEL):
        compiling.write(path, f"Intel's {path}".encode())
    assert compiling.save().files == 3
    return make


def test_another_processor_gets_the_gpu_kernels_and_no_host_library(fresh: Callable[[], Machine], on: On) -> None:
    on(AMD)
    node = fresh()
    outcome = node.restore()
    assert node.content() == {KERNEL: f"Intel's {KERNEL}".encode()}
    assert outcome.status == "restored"
    (note,) = outcome.notes
    assert note == (
        "2 files are left out: they hold code for other hosts "
        f"(isa was {describe(SAPPHIRE_RAPIDS)} there, is {describe(GENOA)} here)"
    )


def test_the_same_processor_gets_everything(fresh: Callable[[], Machine]) -> None:
    node = fresh()
    assert node.restore().files == 3
    assert set(node.content()) == {LIBRARY, LAUNCHER, KERNEL}
    assert node.save().status == "complete"


def test_each_processor_keeps_its_own_library_of_a_path(fresh: Callable[[], Machine], on: On) -> None:
    on(AMD)
    amd = fresh()
    amd.restore()
    amd.write(LIBRARY, b"AMD's, compiled later")
    saved = amd.save()
    assert (saved.status, saved.files) == ("saved", 1), "the kernel was there already"
    for compacted in (False, True):
        if compacted:
            made = compact(amd.store, KEY, SECRET, level=1)
            assert made is not None and len(made.manifest.files) == 4
            for pack in amd.packs():
                if pack.name != Path(made.stored.name).name:
                    pack.unlink()
        for groups, library in ((INTEL, f"Intel's {LIBRARY}".encode()), (AMD, b"AMD's, compiled later")):
            on(groups)
            node = fresh()
            node.restore()
            assert node.content()[LIBRARY] == library
            assert node.content()[KERNEL] == f"Intel's {KERNEL}".encode()
            assert node.save().status == "complete"


def test_a_new_cuda_toolkit_leaves_what_the_cxx_compiler_built(fresh: Callable[[], Machine], on: On) -> None:
    on(host(SAPPHIRE_RAPIDS, nvcc="13.1.12"))
    node = fresh()
    node.restore()
    assert set(node.content()) == {LIBRARY, LAUNCHER, KERNEL}


def test_a_cpu_engine_has_the_facts_in_its_key_and_not_in_packs(tmp_path: Path, store: Path, on: On) -> None:
    on(INTEL)
    node = Machine(tmp_path / "node", store)
    node.write(LIBRARY, b"code")
    node.save(CPU_KEY)
    (pack,) = read_packs(node.store, CPU_KEY, SECRET, [])
    assert pack.manifest.hosts == ()
    assert [file.host for file in pack.manifest.files] == [-1]


def test_a_group_whose_hash_is_of_other_facts_is_refused(fresh: Callable[[], Machine]) -> None:
    node = fresh()
    (pack,) = read_packs(node.store, KEY, SECRET, [])
    text = pack.manifest.to_json()
    assert Manifest.from_json(text, "here") == pack.manifest
    with pytest.raises(CacheValidationError, match="has the parts of another"):
        Manifest.from_json(text.replace(b"gcc-12.2.0", b"gcc-13.3.0"), "here")
