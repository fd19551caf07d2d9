"""The doctor looks at the cache directories of engines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine_loader.cli.diagnosis import cache_directories
from engine_loader.compile_cache import directories
from engine_loader.machine import Mount
from tests.cli.doctor.diagnosing import diagnose


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    return home


def environment(home: Path, **more: str) -> dict[str, str | None]:
    names = [cache.variable for cache in cache_directories._CACHES] + ["XDG_CACHE_HOME", "TRITON_HOME"]
    return {**dict.fromkeys(names), "HOME": str(home), **more}


def test_defaults_resolve_as_in_the_programs_themselves(home: Path) -> None:
    found = diagnose(env=environment(home))
    assert found["VLLM_CACHE_ROOT"]["value"].startswith(f"{home}/.cache/vllm (will be made, writable, ")
    assert found["TRITON_CACHE_DIR"]["value"].startswith(f"{home}/.triton/cache ")
    assert found["HF_HOME"]["value"].startswith(f"{home}/.cache/huggingface ")
    assert found["HF_HUB_CACHE"]["value"].startswith(f"{home}/.cache/huggingface/hub ")


def test_variables_that_move_them(home: Path) -> None:
    env = environment(
        home, XDG_CACHE_HOME=f"{home}/xdg", TRITON_HOME=f"{home}/t", HF_HOME="~/hf", VLLM_CACHE_ROOT=str(home)
    )
    found = diagnose(env=env)
    assert found["VLLM_CACHE_ROOT"]["value"].startswith(f"{home} (exists, writable, ")
    assert found["TRITON_CACHE_DIR"]["value"].startswith(f"{home}/t/.triton/cache ")
    assert found["HF_HUB_CACHE"]["value"].startswith(f"{home}/hf/hub ")


@pytest.mark.engine
def test_what_vllm_and_torch_say_is_what_we_say(home: Path) -> None:
    code = (
        "import vllm.envs, torch._inductor.runtime.cache_dir_utils as c\n"
        "import huggingface_hub.constants as h, triton.knobs as t\n"
        "print(vllm.envs.VLLM_CACHE_ROOT, c.default_cache_dir(), t.cache.dir, h.HF_HUB_CACHE, sep='\\n')\n"
    )
    env = {key: value for key, value in {**os.environ, **environment(home)}.items() if value is not None}
    for more in ({}, {"XDG_CACHE_HOME": str(home / "xdg")}):
        said = subprocess.run([sys.executable, "-c", code], env=env | more, capture_output=True, text=True, check=True)
        found = diagnose(env={**environment(home), **more})
        names = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HUB_CACHE")
        ours = [found[name]["value"].partition(" (")[0] for name in names]
        assert ours == said.stdout.split("\n")[-5:-1]


def test_a_directory_that_cannot_be_written_to_is_a_failure(home: Path) -> None:
    # Root may write anywhere but here.
    finding = diagnose(env=environment(home, VLLM_CACHE_ROOT="/proc/engine-loader"))["VLLM_CACHE_ROOT"]
    assert finding["status"] == "fail"
    assert "cannot write" in finding["value"]
    assert "set VLLM_CACHE_ROOT to a directory" in finding["repair"]


def test_a_file_where_a_directory_is_meant(home: Path) -> None:
    (home / "file").touch()
    for path in (home / "file", home / "file" / "below"):
        finding = diagnose(env=environment(home, TRITON_CACHE_DIR=str(path)))["TRITON_CACHE_DIR"]
        assert finding["status"] == "fail"
        assert finding["value"] == f"{path}: {home}/file is a file, not a directory"


def test_looking_leaves_nothing_behind(home: Path) -> None:
    diagnose(env=environment(home, VLLM_CACHE_ROOT=str(home)))
    assert list(home.iterdir()) == []


def test_a_nearly_full_disk_a_network_and_noexec(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = next(cache for cache in cache_directories._CACHES if cache.variable == "VLLM_CACHE_ROOT")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(home))
    monkeypatch.setattr(cache_directories, "mount_of", lambda path: Mount("/", "ext4", "disk", frozenset({"noexec"})))
    assert cache_directories._check(cache).status == "fail"
    monkeypatch.setattr(cache_directories, "mount_of", lambda path: Mount("/", "nfs4", "server:/", frozenset()))
    assert cache_directories._check(cache).status == "warn"
    assert "local disk" in cache_directories._check(cache).repair
    monkeypatch.setattr(cache_directories, "mount_of", lambda path: Mount("/", "ext4", "disk", frozenset()))
    monkeypatch.setattr(cache_directories, "_FEW_BYTES", 1 << 62)
    assert "nearly full" in cache_directories._check(cache).value


def test_a_user_without_a_name_gets_torchs_own_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    def getuser() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(directories.getpass, "getuser", getuser)
    assert directories.default_inductor_directory().endswith(f"/torchinductor_uid_{os.getuid()}")


def test_a_volume_that_others_may_write_is_no_tick(home: Path) -> None:
    home.chmod(0o2775)
    finding = diagnose(env=environment(home, VLLM_CACHE_ROOT=str(home)))["VLLM_CACHE_ROOT"]
    assert finding["status"] == "warn"
    assert "others may write it (mode 2775)" in finding["value"]
    assert f"name a directory below it: VLLM_CACHE_ROOT={home}/private" in finding["repair"]
