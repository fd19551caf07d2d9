"""What must not start, and what each says."""

import json
import shutil
import textwrap
from pathlib import Path

import pytest

from tests.engines.sglang.conftest import VERSION
from tests.engines.sglang.serving import said
from tests.support.sglang_server import WITHOUT_PLUGINS, SglangServer, patched

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

NEWER = ("0.5.23",)
needs_plugins = pytest.mark.skipif(VERSION in WITHOUT_PLUGINS, reason="this version loads no plugins")


def log_of_failed_start(model: Path, *args: str, env: dict[str, str | None] | None = None) -> str:
    with patched(VERSION):
        return log_as_installed(model, *args, env=env)


def log_as_installed(model: Path, *args: str, env: dict[str, str | None] | None = None) -> str:
    server = SglangServer(VERSION, model, "--load-format", "b10_3fs", *args, env=env)
    with pytest.raises(RuntimeError, match=r"ended with status -?[1-9]"), server:
        pass
    return server.log


def test_an_unknown_option_is_named_with_those_that_exist(llama: Path) -> None:
    log = log_of_failed_start(llama, "--model-loader-extra-config", '{"thread": 2}')
    assert "there is no setting" in log
    assert "buffer_bytes" in log


OPTIONS = {
    "an option of SGLang's reader": ("--model-loader-extra-config", '{"num_threads": 2}'),
    "bitsandbytes": ("--quantization", "bitsandbytes"),
    "gguf": ("--quantization", "gguf"),
    "auto-round-int8": ("--quantization", "auto-round-int8"),
    "modelopt": ("--modelopt-quant", "fp8"),
    "weight cache": ("--weight-cache-mode", "client"),
    "overlap": ("--startup-weight-load-mode", "overlap"),
}
OF_NEWER_VERSIONS = ("weight cache", "overlap", "auto-round-int8")


def test_what_has_a_loader_of_its_own_is_refused_before_a_process_is_started(llama: Path) -> None:
    asked = [case for case in OPTIONS if VERSION in NEWER or case not in OF_NEWER_VERSIONS]
    listed = said(VERSION, "refusals.py", llama, json.dumps([OPTIONS[case] for case in asked]))
    errors = dict(zip(asked, listed, strict=True))
    assert all(error.startswith("SettingsError: ") for error in errors.values()), errors
    refused = "--load-format b10_3fs cannot serve here: SGLang "
    assert "num_threads is for SGLang's own reader; here, set threads" in errors["an option of SGLang's reader"]
    for quantisation in {"bitsandbytes", "gguf", "auto-round-int8"} & set(asked):
        assert f"{refused}has a loader of its own for the quantisation {quantisation}" in errors[quantisation]
        assert "--load-format auto" in errors[quantisation]
    assert f"{refused}quantises the model by ModelOpt while it loads it" in errors["modelopt"]
    if VERSION in NEWER:
        assert "--load-format b10_3fs and --weight-cache-mode client exclude each other" in errors["weight cache"]
        assert "and --startup-weight-load-mode overlap exclude each other" in errors["overlap"]


def test_modelopts_loader_is_never_taken_in_the_place_of_ours_in_silence(llama: Path, tmp_path: Path) -> None:
    """On SGLang's own classes: a server on a CPU refuses these before it looks for a loader."""
    modelopt = ("modelopt", "modelopt_fp8", "modelopt_fp4")
    for error in said(VERSION, "loaders.py", llama, *modelopt, "gguf", "auto-round-int8").values():
        assert error.startswith("SettingsError: --load-format b10_3fs cannot serve here: SGLang ")
    quantised = tmp_path / "quantised"
    shutil.copytree(llama, quantised)
    (quantised / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    for found in said(VERSION, "loaders.py", quantised, *modelopt).values():
        if VERSION in NEWER:
            assert found == "B10ModelLoader"
        else:
            assert "SGLang loads such models by its own ModelOptModelLoader" in found


@needs_plugins
def test_a_plugin_that_may_not_load_is_an_unknown_format(llama: Path) -> None:
    log = log_of_failed_start(llama, env={"SGLANG_PLUGINS": "another"})
    assert "invalid choice: 'b10_3fs'" in log
    assert "Skipping plugin b10_3fs" in log or "usage: sglang serve" in log


@pytest.mark.skipif(VERSION not in WITHOUT_PLUGINS, reason="this version loads plugins")
def test_a_version_without_plugins_does_not_know_the_format_before_it_is_patched(llama: Path) -> None:
    assert "invalid choice: 'b10_3fs'" in log_as_installed(llama)


@needs_plugins
def test_another_plugin_in_our_place_is_told(llama: Path, tmp_path: Path) -> None:
    other_plugin(
        tmp_path,
        """
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        def verify(self):
            pass

        def register():
            target = "sglang.srt.configs.load_config.LoadConfig._verify_load_format"
            HookRegistry.register(target, verify, HookType.REPLACE)
        """,
    )
    log = log_of_failed_start(llama, env={"PYTHONPATH": str(tmp_path)})
    assert f"--load-format b10_3fs is not in force in SGLang {VERSION}" in log
    assert "SGLANG_PLUGINS=b10_3fs" in log


@needs_plugins
def test_a_version_without_the_name_that_we_extend_is_told(llama: Path, tmp_path: Path) -> None:
    other_plugin(
        tmp_path,
        """
        from sglang.srt.configs.load_config import LoadConfig

        def register():
            pass

        LoadConfig.checked_otherwise = LoadConfig._verify_load_format
        LoadConfig.__post_init__ = lambda self: self.checked_otherwise()
        del LoadConfig._verify_load_format
        """,
        name="a_first",
    )
    log = log_of_failed_start(llama, env={"PYTHONPATH": str(tmp_path)})
    assert f"--load-format b10_3fs is not in force in SGLang {VERSION}" in log
    assert "has no attribute '_verify_load_format'" in log


def other_plugin(directory: Path, code: str, name: str = "other") -> None:
    """A plugin as a package of somebody else brings it."""
    (directory / f"{name}_plugin.py").write_text(textwrap.dedent(code))
    metadata = directory / f"{name}_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}_plugin:register\n")
