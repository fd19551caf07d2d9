"""The doctor looks at how engines find the plugin."""

from importlib.metadata import EntryPoint, EntryPoints
from types import SimpleNamespace

import pytest

from engine_loader.cli.diagnosis import engine_plugins
from tests.cli.doctor.diagnosing import diagnose, only


@pytest.mark.parametrize("value", ["", "other", "other,lora", "other, b10_3fs", "b10_3fs ,other"])
def test_vllm_plugins_that_keep_ours_out_are_found(value: str) -> None:
    finding = diagnose(env={"VLLM_PLUGINS": value})["VLLM_PLUGINS"]
    assert finding["status"] == "fail"
    assert repr(value) in finding["value"]
    # What is proposed is what vLLM would let through.
    if "VLLM_PLUGINS=" in finding["repair"]:
        assert "b10_3fs" in finding["repair"].partition("VLLM_PLUGINS=")[2].split(",")


@pytest.mark.parametrize("value", ["b10_3fs", "other,b10_3fs", None])
def test_vllm_plugins_that_let_ours_through_are_no_finding(value: str | None) -> None:
    assert "VLLM_PLUGINS" not in diagnose(env={"VLLM_PLUGINS": value})


def test_sglang_strips_names_and_takes_an_empty_value_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, kept_out in (("", False), (" b10_3fs , x", False), ("x", True)):
        monkeypatch.setenv("SGLANG_PLUGINS", value)
        assert bool(engine_plugins._filter(engine_plugins._SGLANG)) is kept_out, value


def test_a_missing_entry_point_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_who_provides_the_entry_point(values: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = EntryPoints(EntryPoint("b10_3fs", value, "vllm.general_plugins") for value in values)
    monkeypatch.setattr(engine_plugins, "entry_points", lambda **_: entries)
    assert engine_plugins._entry_point(engine_plugins._VLLM).status == expected


@pytest.mark.parametrize(
    ("version", "expected"), [("0.10.0", "fail"), ("0.10.1", "ok"), ("0.32.0+cpu", "ok"), ("1.0", "ok")]
)
def test_versions_that_have_no_plugins_yet(version: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_plugins, "installed_version", lambda *names: version)
    assert engine_plugins._version_finding(engine_plugins._VLLM).status == expected


def test_a_version_without_plugins_that_a_patch_gives_them_is_told_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_no_engine_at_all_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_plugins, "find_spec", lambda name: None)
    assert only(engine_plugins.check_engines()).status == "warn"


def test_a_plugin_that_does_not_register_is_a_failure_with_the_engines_reason() -> None:
    probe = "raise ValueError('Load format `b10_3fs` is not supported')"
    finding = engine_plugins._run_plugins(
        SimpleNamespace(name="vLLM", module="vllm", load="def load(): ...", probe=probe)
    )  # type: ignore[arg-type]
    assert finding.status == "fail"
    assert finding.value == "not registered: ValueError: Load format `b10_3fs` is not supported"


def test_extensions_for_another_torch_are_named_with_the_line_that_removes_them(
    monkeypatch: pytest.MonkeyPatch,
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
def test_the_real_engine_takes_the_format() -> None:
    found = {finding.name: finding for finding in engine_plugins.check_engines()}
    finding = found["vLLM --load-format b10_3fs"]
    assert finding.status == "ok", finding
    assert finding.value.startswith("registered: engine_loader.engines.vllm.loader.")
