"""`engine-loader doctor --bundle`: everything that helps, and none of the secrets that lie around."""

import json
import stat
import tarfile
from pathlib import Path

import pytest

from engine_loader.cli.diagnosis.bundle import write_bundle
from tests.report.made_starts import MadeStart, usual_start

from .running import invoke

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYplanted",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00",
    "HF_TOKEN": "hf_plantedplantedplanted",
    "OPENAI_API_KEY": "sk-planted0planted0planted0",
    "VLLM_API_KEY": "a-word-that-looks-like-nothing",
    "MY_PASSWORD": 'with "quotes" and \\ in it',
    "DATABASE_DSN": "postgres://user:hunter2planted@db/x",
    "SOMETHING": "a value of somebody else's variable",
}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Secrets in the environment, in settings, in a key file and in the events of a start."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "key").write_text("the-shared-secret-of-the-fleet-planted")
    monkeypatch.setenv("ENGINE_LOADER_COMPILE_CACHE__KEY_FILE", str(tmp_path / "key"))
    monkeypatch.setenv("ENGINE_LOADER_LOADER__OBJECT_STORE_ENDPOINT_URL", "https://me:planted-pass@store.example")
    monkeypatch.setenv("ENGINE_LOADER_LOADER__THREADS", "7")
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/caches/vllm")
    monkeypatch.setenv("ENGINE_LOADER_REPORT__DIRECTORY", str(tmp_path / "starts"))
    usual_start(tmp_path / "starts")
    odd = MadeStart(tmp_path / "starts", "20261130T090000Z-2", model=f"model-{SECRETS['VLLM_API_KEY']}")
    odd.process(f"worker {SECRETS['MY_PASSWORD']}", ("weights", 0, 1), pid=1, parent=0, ready=1)
    (tmp_path / "starts" / "20261130T080000Z-1" / "notes.jsonl").write_text(f"Bearer {'planted' * 4}\n")
    return tmp_path


def contents(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        return {
            member.name.removeprefix("engine-loader-bundle/"): found.read().decode()
            for member in archive
            if (found := archive.extractfile(member)) is not None
        }


def test_no_planted_secret_is_in_it(planted: Path) -> None:
    said = "the endpoint https://me:planted-pass@store.example refused hf_plantedplantedplanted"
    write_bundle(planted / "bundle.tar.gz", [{"value": said}, {"value": SECRETS["MY_PASSWORD"]}])
    files = contents(planted / "bundle.tar.gz")
    everything = "\n".join(files.values())
    words = [*SECRETS.values(), "planted-pass", "the-shared-secret", "hunter2planted", "plantedplanted"]
    words += [json.dumps(word)[1:-1] for word in words]
    assert [word for word in words if word in everything] == []
    assert "the endpoint https://***@store.example refused ***" in files["doctor.json"]


def test_it_has_what_is_asked_for(planted: Path) -> None:
    write_bundle(planted / "bundle.tar.gz", [{"name": "torch", "status": "ok"}])
    files = contents(planted / "bundle.tar.gz")
    assert json.loads(files["doctor.json"]) == [{"name": "torch", "status": "ok"}]
    assert json.loads(files["settings.json"])["loader.threads"] == {
        "value": "7",
        "default": "auto",
        "origin": "ENGINE_LOADER_LOADER__THREADS",
    }
    environment = json.loads(files["environment.json"])
    assert environment["VLLM_CACHE_ROOT"] == "/caches/vllm"
    assert {environment[name] for name in SECRETS} == {"***"}
    assert "torch==" in files["packages.txt"]
    assert json.loads(files["machine.json"])["cpus"] >= 1
    assert json.loads(files["starts/20261130T080000Z-1/report.json"])["ready_s"] == 40
    events = files["starts/20261130T080000Z-1/one-3-0.jsonl"].splitlines()
    assert all(json.loads(line)["pid"] == 3 for line in events if line)


def test_only_its_owner_reads_it_though_the_file_was_there(planted: Path) -> None:
    (planted / "bundle.tar.gz").write_text("old")
    (planted / "bundle.tar.gz").chmod(0o644)
    write_bundle(planted / "bundle.tar.gz", [])
    assert stat.S_IMODE((planted / "bundle.tar.gz").stat().st_mode) == 0o600


def test_bad_settings_do_not_keep_it_from_being_written(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_LOADER_LOADER__THREADS", "many")
    write_bundle(planted / "bundle.tar.gz", [])
    assert "ENGINE_LOADER_LOADER__THREADS" in contents(planted / "bundle.tar.gz")["settings.json"]


def test_the_command_writes_it_with_its_findings(tmp_path: Path) -> None:
    said = invoke("doctor", "--quick", "--bundle", tmp_path / "b.tar.gz")
    assert "without secrets; look at it before you send it" in said.stdout
    findings = json.loads(contents(tmp_path / "b.tar.gz")["doctor.json"])
    assert "python" in {finding["name"] for finding in findings}
