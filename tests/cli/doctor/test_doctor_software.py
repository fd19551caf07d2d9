"""The doctor looks at versions, settings and the native library."""

import sys
from typing import Any

import pytest
import torch

from engine_loader.cli.diagnosis import software
from engine_loader.errors import TransferError
from tests.cli.doctor.diagnosing import diagnose, only


def test_versions_are_those_installed() -> None:

    found = diagnose()
    assert found["python"]["value"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"]["value"] == torch.__version__


def test_settings_that_are_not_the_default_are_named_with_their_origin() -> None:
    found = diagnose(env={"ENGINE_LOADER_LOADER__THREADS": "3"})
    assert found["settings"]["value"] == "loader.threads from ENGINE_LOADER_LOADER__THREADS"


def test_a_native_engine_that_was_not_built_is_a_warning_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_readers(settings: Any) -> Any:
        assert settings.engine == "cpp"
        raise TransferError("the native library was not built")

    monkeypatch.setattr("engine_loader.transfer.constructor.make_readers", make_readers)
    monkeypatch.setattr(software.shutil, "which", lambda name: None)
    finding = only(software.check_native_library())
    assert finding.status == "warn"
    assert finding.value == "the native library was not built; the pure-Python one serves instead"
    assert "apt-get install g++" in finding.repair


def test_an_installed_package_of_another_version_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "installed_version", lambda *names: "0.0.1")
    found = {finding.name: finding for finding in software.check_versions()}
    assert found["engine-loader"].status == "warn"
    assert "0.0.1 is installed" in found["engine-loader"].value
