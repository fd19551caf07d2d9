"""What must not start, and what each says."""

import textwrap
from pathlib import Path

import pytest

from tests.sglang.conftest import NEWEST, VERSIONS
from tests.support.sglang_server import SglangServer
from tests.support.tiny_models import make_model

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

WITHOUT_PLUGINS = [version for version in VERSIONS if version in ("0.5.9", "0.5.10")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"), shards=2)


def log_of_failed_start(version: str, model: Path, *args: str, env: dict[str, str | None] | None = None) -> str:
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


def test_a_quantisation_with_a_loader_of_its_own_is_refused(llama: Path) -> None:
    log = log_of_failed_start(NEWEST, llama, "--quantization", "bitsandbytes")
    assert "--load-format b10_3fs cannot serve here" in log
    assert "quantisation bitsandbytes" in log
    assert "--load-format auto" in log


def test_a_plugin_that_may_not_load_is_an_unknown_format(llama: Path) -> None:
    log = log_of_failed_start(NEWEST, llama, env={"SGLANG_PLUGINS": "another"})
    assert "invalid choice: 'b10_3fs'" in log
    assert "Skipping plugin b10_3fs" in log or "usage: sglang serve" in log


@pytest.mark.parametrize("version", WITHOUT_PLUGINS)
def test_a_version_without_plugins_does_not_know_the_format_before_it_is_patched(version: str, llama: Path) -> None:
    assert "invalid choice: 'b10_3fs'" in log_of_failed_start(version, llama)


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
