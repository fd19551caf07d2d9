"""What must not start, and what each says."""

import json
import os
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from tests.engines.sglang.conftest import NEWEST, VERSIONS, model_for_sglang
from tests.support.sglang_server import WITHOUT_PLUGINS, SglangServer, patched, python_of

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

LOADERS = Path(__file__).parents[2] / "support" / "sglang" / "loaders.py"
needs_plugins = pytest.mark.skipif(NEWEST in WITHOUT_PLUGINS, reason="this version loads no plugins")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_for_sglang("llama", tmp_path_factory.mktemp("llama"), shards=2)


def log_of_failed_start(version: str, model: Path, *args: str, env: dict[str, str | None] | None = None) -> str:
    with patched(version):
        return log_as_installed(version, model, *args, env=env)


def log_as_installed(version: str, model: Path, *args: str, env: dict[str, str | None] | None = None) -> str:
    server = SglangServer(version, model, "--load-format", "b10_3fs", *args, env=env)
    with pytest.raises(RuntimeError, match=r"ended with status -?[1-9]"), server:
        pass
    return server.log


def test_an_unknown_option_is_named_with_those_that_exist(llama: Path) -> None:
    log = log_of_failed_start(NEWEST, llama, "--model-loader-extra-config", '{"thread": 2}')
    assert "there is no setting" in log
    assert "buffer_bytes" in log


def test_an_option_of_sglangs_reader_is_refused_with_ours(llama: Path) -> None:
    log = log_of_failed_start(NEWEST, llama, "--model-loader-extra-config", '{"num_threads": 2}')
    assert "num_threads is for SGLang's own reader; here, set threads" in log


@pytest.mark.parametrize("quantisation", ["bitsandbytes", "gguf", "auto-round-int8"])
def test_a_quantisation_with_a_loader_of_its_own_is_refused(llama: Path, quantisation: str) -> None:
    log = log_of_failed_start(NEWEST, llama, "--quantization", quantisation)
    assert "--load-format b10_3fs cannot serve here" in log
    assert f"a loader of its own for the quantisation {quantisation}" in log
    assert "--load-format auto" in log


def test_modelopt_that_quantises_while_it_loads_is_refused(llama: Path) -> None:
    log = log_of_failed_start(NEWEST, llama, "--modelopt-quant", "fp8")
    assert "--load-format b10_3fs cannot serve here: SGLang quantises the model by ModelOpt while it loads it" in log


def test_the_weight_cache_is_refused(llama: Path) -> None:
    if NEWEST in ("0.5.9", "0.5.10", "0.5.11"):
        pytest.skip("this version has no weight cache")
    log = log_of_failed_start(NEWEST, llama, "--weight-cache-mode", "client")
    assert "--load-format b10_3fs and --weight-cache-mode client exclude each other" in log


@pytest.mark.parametrize("version", VERSIONS)
def test_modelopts_loader_is_never_taken_in_the_place_of_ours_in_silence(
    version: str, llama: Path, tmp_path: Path
) -> None:
    """On SGLang's own classes: a server on a CPU refuses these before it looks for a loader."""
    modelopt = ("modelopt", "modelopt_fp8", "modelopt_fp4")
    for error in loaders(version, llama, *modelopt, "gguf", "auto-round-int8").values():
        assert error.startswith("SettingsError: --load-format b10_3fs cannot serve here: SGLang ")
    quantised = tmp_path / "quantised"
    shutil.copytree(llama, quantised)
    (quantised / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    for found in loaders(version, quantised, *modelopt).values():
        if version in ("0.5.9", "0.5.10", "0.5.11"):
            assert "SGLang loads such models by its own ModelOptModelLoader" in found
        else:
            assert found == "B10ModelLoader"


def loaders(version: str, model: Path, *quantisations: str) -> dict[str, str]:
    """Quantisation -> what SGLang's choice of a loader for it comes to."""
    command = [str(python_of(version)), str(LOADERS), str(model), *quantisations]
    given = {name: value for name, value in {**os.environ, **SglangServer.ENVIRONMENT}.items() if value is not None}
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOADERS ")]
    return dict(json.loads(line.removeprefix("LOADERS ")))


@needs_plugins
def test_a_plugin_that_may_not_load_is_an_unknown_format(llama: Path) -> None:
    log = log_of_failed_start(NEWEST, llama, env={"SGLANG_PLUGINS": "another"})
    assert "invalid choice: 'b10_3fs'" in log
    assert "Skipping plugin b10_3fs" in log or "usage: sglang serve" in log


@pytest.mark.parametrize("version", [version for version in VERSIONS if version in WITHOUT_PLUGINS])
def test_a_version_without_plugins_does_not_know_the_format_before_it_is_patched(version: str, llama: Path) -> None:
    assert "invalid choice: 'b10_3fs'" in log_as_installed(version, llama)


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
    log = log_of_failed_start(NEWEST, llama, env={"PYTHONPATH": str(tmp_path)})
    assert f"--load-format b10_3fs is not in force in SGLang {NEWEST}" in log
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
    log = log_of_failed_start(NEWEST, llama, env={"PYTHONPATH": str(tmp_path)})
    assert f"--load-format b10_3fs is not in force in SGLang {NEWEST}" in log
    assert "has no attribute '_verify_load_format'" in log


def other_plugin(directory: Path, code: str, name: str = "other") -> None:
    """A plugin as a package of somebody else brings it."""
    (directory / f"{name}_plugin.py").write_text(textwrap.dedent(code))
    metadata = directory / f"{name}_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}_plugin:register\n")
