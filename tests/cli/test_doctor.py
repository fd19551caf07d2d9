"""``engine-loader doctor``: every finding was looked at, and what is wrong comes with how to repair it."""

import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_loader.cli.diagnosis import (
    cache_directories,
    engine_plugins,
    file_systems,
    resources,
    software,
)
from engine_loader.cli.diagnosis.finding import Finding, impatient
from engine_loader.compile_cache import directories
from engine_loader.errors import TransferError
from engine_loader.machine import Memory, Mount
from engine_loader.settings import LoaderSettings
from tests.cli.running import invoke, run
from tests.support.checkpoints import checkpoint, entry
from tests.support.moto_server import MotoServer
from tests.support.training_checkpoints import save_training

STATUSES = ("ok", "absent", "warn", "fail")


def diagnose(*arguments: str | Path, env: dict[str, str | None] | None = None) -> dict[str, dict[str, Any]]:
    """The findings of ``doctor --quick --json`` by name."""
    result = invoke("doctor", "--quick", "--json", *arguments, env=env)
    found = json.loads(result.stdout)
    failed = any(finding["status"] == "fail" for finding in found["findings"])
    assert result.exit_code == int(failed)
    return {finding["name"]: finding for finding in found["findings"]}


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


class TestReport:
    def test_as_json_every_finding_has_all_its_fields_and_what_is_not_well_says_how_to_mend_it(self) -> None:
        found = json.loads(invoke("doctor", "--quick", "--json").stdout)
        for finding in found["findings"]:
            assert set(finding) == {"area", "name", "status", "value", "repair", "detail"}
            assert finding["status"] in STATUSES
            assert finding["value"]
            assert finding["status"] in ("ok", "absent") or finding["repair"]
        statuses = [finding["status"] for finding in found["findings"]]
        assert found["summary"] == {status: statuses.count(status) for status in STATUSES}
        areas = {finding["area"] for finding in found["findings"]}
        assert areas >= {"software", "engines", "sources", "caches", "machine"}

    def test_a_person_sees_marks_and_how_to_mend(self) -> None:
        output = invoke("doctor", "--quick", env={"ENGINE_LOADER_LOADER__THREADS": "0"}).output
        assert "✓ python: " in output
        assert "✗ settings: ENGINE_LOADER_LOADER__THREADS: loader.threads = '0'" in output
        assert "    → engine-loader settings shows them all" in output
        assert " 1 to repair" in output.splitlines()[-1]

    def test_what_is_absent_and_not_needed_has_no_tick_and_code_is_shown_when_asked_for(self) -> None:
        lines = invoke("doctor", "--quick").output.splitlines()
        assert "  - usrbio: no 3FS mount here" in lines
        assert "  - file systems: no path was given" in lines
        assert "  ✓ fix-up inductor-header-on-hit: applied when an engine starts" in lines
        assert not any("_precompile_header" in line for line in lines)
        detailed = invoke("doctor", "--quick", "--verbose").output
        assert "_precompile_header" in detailed
        assert "HF3FS_LIB_DIR is not set" in detailed

    def test_the_status_is_1_when_anything_fails(self) -> None:
        assert run("doctor", "--quick", env={"VLLM_PLUGINS": ""}).returncode == 1

    def test_strict_counts_warnings(self) -> None:
        with few_descriptors():
            assert invoke("doctor", "--quick").exit_code in (0, 1)
            assert invoke("doctor", "--quick", "--strict").exit_code == 1

    def test_a_tensor_is_read_back_from_every_source(self) -> None:
        assert [(finding.name, finding.status) for finding in software.check_reading()] == [
            ("posix", "ok"),
            ("memory", "ok"),
        ]


class TestSoftware:
    def test_versions_are_those_installed(self) -> None:
        import torch

        found = diagnose()
        assert found["python"]["value"] == ".".join(map(str, sys.version_info[:3]))
        assert found["torch"]["value"] == torch.__version__

    def test_settings_that_are_not_the_default_are_named_with_their_origin(self) -> None:
        found = diagnose(env={"ENGINE_LOADER_LOADER__THREADS": "3"})
        assert found["settings"]["value"] == "loader.threads from ENGINE_LOADER_LOADER__THREADS"

    def test_a_native_engine_that_was_not_built_is_a_warning_with_the_reason(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def make_readers(settings: Any) -> Any:
            assert settings.engine == "cpp"
            raise TransferError("the native library was not built")

        monkeypatch.setattr("engine_loader.transfer.constructor.make_readers", make_readers)
        monkeypatch.setattr(software.shutil, "which", lambda name: None)
        finding = only(software.check_native_library())
        assert finding.status == "warn"
        assert finding.value == "the native library was not built; the pure-Python one serves instead"
        assert "apt-get install g++" in finding.repair

    def test_an_installed_package_of_another_version_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(software, "installed_version", lambda *names: "0.0.1")
        found = {finding.name: finding for finding in software.check_versions()}
        assert found["engine-loader"].status == "warn"
        assert "0.0.1 is installed" in found["engine-loader"].value


class TestEngines:
    @pytest.mark.parametrize("value", ["", "other", "other,lora", "other, b10_3fs", "b10_3fs ,other"])
    def test_vllm_plugins_that_keep_ours_out_are_found(self, value: str) -> None:
        finding = diagnose(env={"VLLM_PLUGINS": value})["VLLM_PLUGINS"]
        assert finding["status"] == "fail"
        assert repr(value) in finding["value"]
        # What is proposed is what vLLM would let through.
        if "VLLM_PLUGINS=" in finding["repair"]:
            assert "b10_3fs" in finding["repair"].partition("VLLM_PLUGINS=")[2].split(",")

    @pytest.mark.parametrize("value", ["b10_3fs", "other,b10_3fs", None])
    def test_vllm_plugins_that_let_ours_through_are_no_finding(self, value: str | None) -> None:
        assert "VLLM_PLUGINS" not in diagnose(env={"VLLM_PLUGINS": value})

    def test_sglang_strips_names_and_takes_an_empty_value_for_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for value, kept_out in (("", False), (" b10_3fs , x", False), ("x", True)):
            monkeypatch.setenv("SGLANG_PLUGINS", value)
            assert bool(engine_plugins._filter(engine_plugins._SGLANG)) is kept_out, value

    def test_a_missing_entry_point_is_a_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine_plugins, "entry_points", lambda **_: EntryPoints())
        finding = engine_plugins._entry_point(engine_plugins._VLLM)
        assert finding.status == "fail"
        assert finding.repair.startswith("pip install engine-loader")

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            (["engine_loader.plugin:register"], "ok"),
            (["other.plugin:register"], "fail"),
            (["engine_loader.plugin:register", "other:register"], "fail"),
        ],
    )
    def test_who_provides_the_entry_point(
        self, values: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entries = EntryPoints(EntryPoint("b10_3fs", value, "vllm.general_plugins") for value in values)
        monkeypatch.setattr(engine_plugins, "entry_points", lambda **_: entries)
        assert engine_plugins._entry_point(engine_plugins._VLLM).status == expected

    @pytest.mark.parametrize(
        ("version", "expected"), [("0.10.0", "fail"), ("0.10.1", "ok"), ("0.32.0+cpu", "ok"), ("1.0", "ok")]
    )
    def test_versions_that_have_no_plugins_yet(
        self, version: str, expected: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine_plugins, "installed_version", lambda *names: version)
        assert engine_plugins._version_finding(engine_plugins._VLLM).status == expected

    def test_a_version_without_plugins_that_a_patch_gives_them_is_told_its_name(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine_plugins, "installed_version", lambda *names: "0.5.10")
        patch = engine_plugins._patch_of(engine_plugins._SGLANG)
        assert patch is not None
        finding = engine_plugins._version_finding(engine_plugins._SGLANG, patch)
        assert (finding.status, finding.repair.partition(",")[0]) == (
            "fail",
            "engine-loader patch apply sglang-0.5.10-plugin",
        )
        monkeypatch.setattr(type(patch), "state", lambda self: "applied")
        assert engine_plugins._version_finding(engine_plugins._SGLANG, patch).status == "ok"
        monkeypatch.setattr(engine_plugins, "installed_version", lambda *names: "0.5.11")
        assert engine_plugins._patch_of(engine_plugins._SGLANG) is None

    def test_no_engine_at_all_is_a_warning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine_plugins, "find_spec", lambda name: None)
        assert only(engine_plugins.check_engines()).status == "warn"

    def test_a_plugin_that_does_not_register_is_a_failure_with_the_engines_reason(self) -> None:
        probe = "raise ValueError('Load format `b10_3fs` is not supported')"
        finding = engine_plugins._run_plugins(
            SimpleNamespace(name="vLLM", module="vllm", load="def load(): ...", probe=probe)
        )  # type: ignore[arg-type]
        assert finding.status == "fail"
        assert finding.value == "not registered: ValueError: Load format `b10_3fs` is not supported"

    def test_extensions_for_another_torch_are_named_with_the_line_that_removes_them(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        installed = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchcodec": "0.17.0"}
        monkeypatch.setattr(engine_plugins, "installed_version", installed.get)
        probe = "raise RuntimeError('operator torchvision::nms does not exist')"
        finding = engine_plugins._run_plugins(
            SimpleNamespace(name="vLLM", module="vllm", load="def load(): ...", probe=probe)
        )  # type: ignore[arg-type]
        assert finding.status == "fail"
        assert finding.repair == (
            "one of torchvision, torchcodec was built for another torch than 2.13.0+cpu: install the build for it, or "
            "pip uninstall torchvision torchcodec: text models are served without"
        )

    @pytest.mark.engine
    def test_the_real_engine_takes_the_format(self) -> None:
        found = {finding.name: finding for finding in engine_plugins.check_engines()}
        finding = found["vLLM --load-format b10_3fs"]
        assert finding.status == "ok", finding
        assert finding.value.startswith("registered: engine_loader.engines.vllm.loader.")


class TestSources:
    def test_a_model_on_a_file_system(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(checkpoint({"a": entry("U8", [1 << 20])}))
        found = diagnose(tmp_path)
        assert "1 file, 1.00 MiB, all have a sound header" in found[str(tmp_path)]["value"]
        assert found[f"direct IO on {tmp_path}"]["value"] == (
            "works"
            if file_systems._read_directly(str(tmp_path / "model.safetensors")) is None
            else "not needed: a tmpfs is memory"
        )

    def test_a_directory_without_weights_is_told_by_its_file_system(self, tmp_path: Path) -> None:
        finding = diagnose(tmp_path)[str(tmp_path)]
        assert finding["status"] == "ok"
        assert "no weights directly in this directory" in finding["value"]

    def test_a_pointer_of_git_lfs_is_no_model(self, tmp_path: Path) -> None:
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
        (tmp_path / "model.safetensors").write_text(pointer)
        finding = diagnose(tmp_path)[str(tmp_path)]
        assert finding["status"] == "fail"
        assert "git lfs pull" in finding["repair"]

    def test_a_setting_that_needs_3fs_where_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ENGINE_LOADER_LOADER__BACKEND", "usrbio")
        (finding,) = file_systems.check_3fs()
        assert (finding.status, finding.name) == ("fail", "usrbio")
        assert "there is no 3FS mount here" in finding.value

    def test_what_settings_name_is_looked_at(self, tmp_path: Path) -> None:
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / "model.safetensors").write_bytes(checkpoint({"a": entry("U8", [16])}))
        env: dict[str, str | None] = {
            "ENGINE_LOADER_LOADER__WEIGHTS_URI": str(tmp_path / "weights"),
            "ENGINE_LOADER_LOADER__CACHE_DIRECTORY": str(tmp_path / "cache"),
            "ENGINE_LOADER_LOADER__CACHE_BYTES": "1GiB",
        }
        found = diagnose(env=env)
        assert found["loader.weights_uri"]["status"] == "ok"
        assert found["loader.weights_uri"]["value"].startswith(f"{tmp_path}/weights: ")
        kept = found["loader.cache_directory"]
        assert (kept["status"], kept["value"].rpartition(") ")[2]) == ("ok", "keeps up to 1.00 GiB")
        (tmp_path / "file").touch()
        env["ENGINE_LOADER_LOADER__WEIGHTS_URI"] = str(tmp_path / "nothing")
        env["ENGINE_LOADER_LOADER__CACHE_DIRECTORY"] = str(tmp_path / "file" / "cache")
        found = diagnose(env=env)
        assert found["loader.weights_uri"]["status"] == "fail"
        assert found["loader.cache_directory"]["status"] == "fail"

    def test_a_model_is_read_by_the_backend_that_is_set(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(checkpoint({"a": entry("U8", [16])}))
        finding = diagnose(tmp_path, env={"ENGINE_LOADER_LOADER__BACKEND": "object_store"})[str(tmp_path)]
        assert finding["status"] == "fail"
        assert "this is not the URL of an object store" in finding["value"]

    def test_files_of_ranks_are_told_by_the_pattern_that_is_set(self, tmp_path: Path) -> None:
        for rank in range(2):
            (tmp_path / f"mine-{rank}-0.safetensors").write_bytes(checkpoint({"a": entry("U8", [1 << 20])}))
        env: dict[str, str | None] = {"ENGINE_LOADER_LOADER__SHARDED_PATTERN": "mine-{rank}-{part}.safetensors"}
        finding = diagnose(tmp_path, env=env)[str(tmp_path)]
        assert (finding["status"], finding["value"].partition("; ")[2]) == (
            "ok",
            "2 files of 2 ranks, 2.00 MiB, all have a sound header",
        )

    def test_a_training_checkpoint_is_a_model_too(self, tmp_path: Path) -> None:
        save_training({"w": torch.zeros(4, 4)}, tmp_path / "step-1", "torch_save", prefix="")
        finding = diagnose(tmp_path / "step-1")[str(tmp_path / "step-1")]
        assert finding["status"] == "ok"
        assert "a training checkpoint" in finding["value"]

    @pytest.mark.servers
    def test_objects_are_looked_at_where_they_are(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with MotoServer() as moto:
            moto.put("bucket", {"model/model.safetensors": checkpoint({"a": entry("U8", [16])})})
            values = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": moto.url}
            for name, value in values.items():
                monkeypatch.setenv(name, value)
            (good,) = file_systems.check_paths(["s3://bucket/model"])
            (bad,) = file_systems.check_paths(["s3://bucket/nothing"])
        assert (good.status, good.value[:8]) == ("ok", "1 object")
        assert bad.status == "fail"

    @pytest.mark.parametrize(
        ("url", "named"),
        [("s3://bucket/model", "AWS_ENDPOINT_URL"), ("gs://bucket/model", "object_store_endpoint_url with")],
    )
    def test_a_store_that_does_not_answer_is_tried_twice_and_told_with_its_own_names(
        self, url: str, named: str
    ) -> None:
        env = {
            "ENGINE_LOADER_LOADER__OBJECT_STORE_ENDPOINT_URL": "http://127.0.0.1:9",
            "ENGINE_LOADER_LOADER__OBJECT_STORE_ANONYMOUS": "true",
        }
        finding = diagnose(url, env=env)[url]
        assert finding["status"] == "fail"
        assert finding["value"] == f"{url}: could not list the prefix: the server cannot be reached after 2 tries"
        assert named in finding["repair"]

    def test_a_server_that_hangs_is_given_seconds_and_not_what_a_load_gives_it(self) -> None:
        settings = impatient(LoaderSettings(max_tries=9, object_store_timeout_s=300))
        assert (settings.max_tries, settings.object_store_timeout_s) == (2, 10)
        settings = impatient(LoaderSettings(max_tries=1, object_store_timeout_s=3))
        assert (settings.max_tries, settings.object_store_timeout_s) == (1, 3)

    def test_a_path_that_is_not_there(self, tmp_path: Path) -> None:
        finding = diagnose(tmp_path / "missing")[str(tmp_path / "missing")]
        assert finding["status"] == "fail"
        assert "[ENOENT]" in finding["value"]

    def test_direct_io_that_is_refused_is_a_warning(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(file_systems, "_read_directly", lambda file: 22)
        finding = file_systems._direct("/x", "/x/model.safetensors", Mount("/x", "fuse.thing", "s", frozenset()))
        assert (finding.status, finding.value) == ("warn", "refused with EINVAL")

    def test_a_3fs_library_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "libhf3fs_api_shared.so").write_text("not a library")
        finding = diagnose(env={"HF3FS_LIB_DIR": str(tmp_path)})["usrbio"]
        assert finding["status"] == "warn"
        assert str(tmp_path) in finding["value"]


class TestCaches:
    @pytest.fixture
    def home(self, tmp_path: Path) -> Path:
        home = tmp_path / "home"
        home.mkdir()
        return home

    def env(self, home: Path, **more: str) -> dict[str, str | None]:
        names = [cache.variable for cache in cache_directories._CACHES] + ["XDG_CACHE_HOME", "TRITON_HOME"]
        return {**dict.fromkeys(names), "HOME": str(home), **more}

    def test_defaults_resolve_as_in_the_programs_themselves(self, home: Path) -> None:
        found = diagnose(env=self.env(home))
        assert found["VLLM_CACHE_ROOT"]["value"].startswith(f"{home}/.cache/vllm (will be made, writable, ")
        assert found["TRITON_CACHE_DIR"]["value"].startswith(f"{home}/.triton/cache ")
        assert found["HF_HOME"]["value"].startswith(f"{home}/.cache/huggingface ")
        assert found["HF_HUB_CACHE"]["value"].startswith(f"{home}/.cache/huggingface/hub ")

    def test_variables_that_move_them(self, home: Path) -> None:
        env = self.env(
            home, XDG_CACHE_HOME=f"{home}/xdg", TRITON_HOME=f"{home}/t", HF_HOME="~/hf", VLLM_CACHE_ROOT=str(home)
        )
        found = diagnose(env=env)
        assert found["VLLM_CACHE_ROOT"]["value"].startswith(f"{home} (exists, writable, ")
        assert found["TRITON_CACHE_DIR"]["value"].startswith(f"{home}/t/.triton/cache ")
        assert found["HF_HUB_CACHE"]["value"].startswith(f"{home}/hf/hub ")

    @pytest.mark.engine
    def test_what_vllm_and_torch_say_is_what_we_say(self, home: Path) -> None:
        code = (
            "import vllm.envs, torch._inductor.runtime.cache_dir_utils as c\n"
            "import huggingface_hub.constants as h, triton.knobs as t\n"
            "print(vllm.envs.VLLM_CACHE_ROOT, c.default_cache_dir(), t.cache.dir, h.HF_HUB_CACHE, sep='\\n')\n"
        )
        env = {key: value for key, value in {**os.environ, **self.env(home)}.items() if value is not None}
        for more in ({}, {"XDG_CACHE_HOME": str(home / "xdg")}):
            said = subprocess.run(
                [sys.executable, "-c", code], env=env | more, capture_output=True, text=True, check=True
            )
            found = diagnose(env={**self.env(home), **more})
            names = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HUB_CACHE")
            ours = [found[name]["value"].partition(" (")[0] for name in names]
            assert ours == said.stdout.split("\n")[-5:-1]

    def test_a_directory_that_cannot_be_written_to_is_a_failure(self, home: Path) -> None:
        # Root may write anywhere but here.
        finding = diagnose(env=self.env(home, VLLM_CACHE_ROOT="/proc/engine-loader"))["VLLM_CACHE_ROOT"]
        assert finding["status"] == "fail"
        assert "cannot write" in finding["value"]
        assert "set VLLM_CACHE_ROOT to a directory" in finding["repair"]

    def test_a_file_where_a_directory_is_meant(self, home: Path) -> None:
        (home / "file").touch()
        for path in (home / "file", home / "file" / "below"):
            finding = diagnose(env=self.env(home, TRITON_CACHE_DIR=str(path)))["TRITON_CACHE_DIR"]
            assert finding["status"] == "fail"
            assert f"{home}/file is not a directory" in finding["value"]

    def test_looking_leaves_nothing_behind(self, home: Path) -> None:
        diagnose(env=self.env(home, VLLM_CACHE_ROOT=str(home)))
        assert list(home.iterdir()) == []

    def test_a_nearly_full_disk_a_network_and_noexec(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = next(cache for cache in cache_directories._CACHES if cache.variable == "VLLM_CACHE_ROOT")
        monkeypatch.setenv("VLLM_CACHE_ROOT", str(home))
        monkeypatch.setattr(
            cache_directories, "mount_of", lambda path: Mount("/", "ext4", "disk", frozenset({"noexec"}))
        )
        assert cache_directories._check(cache).status == "fail"
        monkeypatch.setattr(cache_directories, "mount_of", lambda path: Mount("/", "nfs4", "server:/", frozenset()))
        assert cache_directories._check(cache).status == "warn"
        assert "local disk" in cache_directories._check(cache).repair
        monkeypatch.setattr(cache_directories, "mount_of", lambda path: Mount("/", "ext4", "disk", frozenset()))
        monkeypatch.setattr(cache_directories, "_FEW_BYTES", 1 << 62)
        assert "nearly full" in cache_directories._check(cache).value

    def test_a_user_without_a_name_gets_torchs_own_directory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def getuser() -> str:
            raise KeyError("uid not found")

        monkeypatch.setattr(directories.getpass, "getuser", getuser)
        assert directories.default_inductor_directory().endswith(f"/torchinductor_uid_{os.getuid()}")

    def test_a_volume_that_others_may_write_is_no_tick(self, home: Path) -> None:
        home.chmod(0o2775)
        finding = diagnose(env=self.env(home, VLLM_CACHE_ROOT=str(home)))["VLLM_CACHE_ROOT"]
        assert finding["status"] == "warn"
        assert "others may write it (mode 2775)" in finding["value"]
        assert f"name a directory below it: VLLM_CACHE_ROOT={home}/private" in finding["repair"]


class TestMachine:
    def test_a_quota_below_the_cpus_is_a_warning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resources, "usable_cpus", lambda: 64)
        monkeypatch.setattr(resources, "cgroup_cpus", lambda: 2.5)
        finding = resources._cpus()
        assert finding.status == "warn"
        assert "cgroup quota 2.5" in finding.value

    def test_little_memory_is_a_warning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resources, "memory", lambda: Memory(64 << 30, 1 << 30, 4 << 30))
        finding = resources._memory()
        assert finding.status == "warn"
        assert finding.value == "1.00 GiB available of 64.0 GiB, cgroup limit 4.00 GiB"

    def test_few_descriptors_are_a_warning(self) -> None:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        try:
            finding = resources._descriptors()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert finding.status == "warn"
        assert finding.value.startswith("256 at once, ")
        assert "ulimit -n" in finding.repair

    @pytest.mark.parametrize(
        ("text", "expected"), [("always [madvise] never", "ok"), ("always madvise [never]", "warn")]
    )
    def test_huge_pages(self, text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "enabled").write_text(text)
        monkeypatch.setattr(resources, "_HUGE_PAGES", tmp_path / "enabled")
        assert resources._huge_pages().status == expected

    def test_a_machine_has_all_of_these(self) -> None:
        names = [finding.name for finding in resources.check_machine()]
        assert names[:4] == ["CPUs", "memory", "open files", "transparent huge pages"]
        assert names[4:] == ["/dev/shm", "what ranks share", "temporary files"]
        assert stat.S_ISDIR(os.stat("/dev/shm").st_mode)


@contextmanager
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
