"""The doctor looks at models, their file systems and object stores, and 3FS."""

from pathlib import Path

import pytest
import torch

from engine_loader.cli.diagnosis import file_systems
from engine_loader.cli.diagnosis.finding import impatient
from engine_loader.machine import Mount
from engine_loader.settings import LoaderSettings
from tests.cli.doctor.diagnosing import diagnose
from tests.support.checkpoints import checkpoint, entry
from tests.support.moto_server import MotoServer
from tests.support.training_checkpoints import save_training


def test_a_model_on_a_file_system(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(checkpoint({"a": entry("U8", [1 << 20])}))
    found = diagnose(tmp_path)
    assert "1 file, 1.00 MiB, all have a sound header" in found[str(tmp_path)]["value"]
    assert found[f"direct IO on {tmp_path}"]["value"] == (
        "works"
        if file_systems._read_directly(str(tmp_path / "model.safetensors")) is None
        else "not needed: a tmpfs is memory"
    )


def test_a_directory_without_weights_is_told_by_its_file_system(tmp_path: Path) -> None:
    finding = diagnose(tmp_path)[str(tmp_path)]
    assert finding["status"] == "ok"
    assert "no weights directly in this directory" in finding["value"]


def test_a_pointer_of_git_lfs_is_no_model(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    finding = diagnose(tmp_path)[str(tmp_path)]
    assert finding["status"] == "fail"
    assert "git lfs pull" in finding["repair"]


def test_a_setting_that_needs_3fs_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_LOADER_LOADER__BACKEND", "usrbio")
    (finding,) = file_systems.check_3fs()
    assert (finding.status, finding.name) == ("fail", "usrbio")
    assert "there is no 3FS mount here" in finding.value


def test_what_settings_name_is_looked_at(tmp_path: Path) -> None:
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
    assert found["loader.cache_directory"]["value"] == (
        f"{tmp_path}/file/cache: {tmp_path}/file is a file, not a directory"
    )


def test_a_model_is_read_by_the_backend_that_is_set(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(checkpoint({"a": entry("U8", [16])}))
    finding = diagnose(tmp_path, env={"ENGINE_LOADER_LOADER__BACKEND": "object_store"})[str(tmp_path)]
    assert finding["status"] == "fail"
    assert "this is not the URL of an object store" in finding["value"]


def test_files_of_ranks_are_told_by_the_pattern_that_is_set(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"mine-{rank}-0.safetensors").write_bytes(checkpoint({"a": entry("U8", [1 << 20])}))
    env: dict[str, str | None] = {"ENGINE_LOADER_LOADER__SHARDED_PATTERN": "mine-{rank}-{part}.safetensors"}
    finding = diagnose(tmp_path, env=env)[str(tmp_path)]
    assert (finding["status"], finding["value"].partition("; ")[2]) == (
        "ok",
        "2 files of 2 ranks, 2.00 MiB, all have a sound header",
    )


def test_a_training_checkpoint_is_a_model_too(tmp_path: Path) -> None:
    save_training({"w": torch.zeros(4, 4)}, tmp_path / "step-1", "torch_save", prefix="")
    finding = diagnose(tmp_path / "step-1")[str(tmp_path / "step-1")]
    assert finding["status"] == "ok"
    assert "a training checkpoint" in finding["value"]


@pytest.mark.servers
def test_objects_are_looked_at_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_store_that_does_not_answer_is_tried_twice_and_told_with_its_own_names(url: str, named: str) -> None:
    env = {
        "ENGINE_LOADER_LOADER__OBJECT_STORE_ENDPOINT_URL": "http://127.0.0.1:9",
        "ENGINE_LOADER_LOADER__OBJECT_STORE_ANONYMOUS": "true",
    }
    finding = diagnose(url, env=env)[url]
    assert finding["status"] == "fail"
    assert finding["value"] == f"{url}: could not list the prefix: the server cannot be reached after 2 tries"
    assert named in finding["repair"]


def test_a_server_that_hangs_is_given_seconds_and_not_what_a_load_gives_it() -> None:
    settings = impatient(LoaderSettings(max_tries=9, object_store_timeout_s=300))
    assert (settings.max_tries, settings.object_store_timeout_s) == (2, 10)
    settings = impatient(LoaderSettings(max_tries=1, object_store_timeout_s=3))
    assert (settings.max_tries, settings.object_store_timeout_s) == (1, 3)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    finding = diagnose(tmp_path / "missing")[str(tmp_path / "missing")]
    assert finding["status"] == "fail"
    assert "[ENOENT]" in finding["value"]


def test_direct_io_that_is_refused_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_systems, "_read_directly", lambda file: 22)
    finding = file_systems._direct("/x", "/x/model.safetensors", Mount("/x", "fuse.thing", "s", frozenset()))
    assert (finding.status, finding.value) == ("warn", "refused with EINVAL")


def test_a_3fs_library_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "libhf3fs_api_shared.so").write_text("not a library")
    finding = diagnose(env={"HF3FS_LIB_DIR": str(tmp_path)})["usrbio"]
    assert finding["status"] == "warn"
    assert str(tmp_path) in finding["value"]
