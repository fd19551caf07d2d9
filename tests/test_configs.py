"""The files in configs/ are what a user starts from: they must parse, be complete, and say the truth."""

import json
import os
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from engine_loader.settings import Settings, describe_settings, load_settings
from tests.support.sglang_server import python_of

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def test_engine_loader_yaml_covers_exactly_the_settings_that_exist_each_with_its_default() -> None:
    resolved = load_settings(environ={"ENGINE_LOADER_CONFIG": str(CONFIGS / "engine-loader.yaml")})
    assert set(resolved.origins) == {name for name, _, _ in describe_settings()}
    assert resolved.settings == Settings()


def test_engine_loader_yaml_explains_every_setting() -> None:
    lines = (CONFIGS / "engine-loader.yaml").read_text().splitlines()
    for before, line in pairwise(lines):
        if re.match(r"\s*\w+:", line):
            assert before.strip().startswith("#"), f"nothing explains {line.strip()!r}"


def test_vllm_yaml_names_the_format_and_options_that_exist() -> None:
    config = yaml.safe_load((CONFIGS / "vllm.yaml").read_text())
    assert config["load-format"] == "b10_3fs"
    load_settings(config["model-loader-extra-config"], {})


def test_sglang_yaml_names_the_format_and_options_that_exist() -> None:
    config = yaml.safe_load((CONFIGS / "sglang.yaml").read_text())
    assert config["load-format"] == "b10_3fs"
    assert load_settings(json.loads(config["model-loader-extra-config"]), {}).settings == Settings()


@pytest.mark.sglang
@pytest.mark.parametrize("version", os.environ.get("SGLANG_VERSIONS", "0.5.23 0.5.11").split())
def test_sglang_reads_sglang_yaml_as_it_is_meant(version: str) -> None:
    if version in ("0.5.9", "0.5.10"):
        pytest.skip("it knows the format only where it is patched")
    program = (
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "import argparse, sys\n"
        "from sglang.srt.server_args import ServerArgs\n"
        "try: from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger\n"
        "except ImportError: from sglang.srt.server_args_config_parser import ConfigArgumentMerger\n"
        "parser = argparse.ArgumentParser(); ServerArgs.add_cli_args(parser)\n"
        "merger = ConfigArgumentMerger(parser)\n"
        "found = parser.parse_args(merger.merge_config_with_args(sys.argv[1:]))\n"
        "print('FOUND', found.model_path, found.load_format, found.model_loader_extra_config)\n"
    )
    command = [str(python_of(version)), "-c", program, "--config", str(CONFIGS / "sglang.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    _, model, load_format, options = line.split(" ", 3)
    assert (model, load_format) == ("/models/llama", "b10_3fs")
    assert load_settings(json.loads(options), {}).settings.loader == Settings().loader


@pytest.mark.engine
def test_vllm_reads_vllm_yaml_as_it_is_meant() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("--config")
    arguments = parser.parse_args(["--config", str(CONFIGS / "vllm.yaml")])
    assert (arguments.model, arguments.load_format) == ("/models/llama", "b10_3fs")
    extra = arguments.model_loader_extra_config
    loader = load_settings(json.loads(extra) if isinstance(extra, str) else extra, {}).settings.loader
    assert loader == Settings().loader


def test_env_example_sets_only_what_exists() -> None:
    environ = {}
    for line in (CONFIGS / "env.example").read_text().splitlines():
        # Also what is commented out: a user will take the mark away.
        found = re.fullmatch(r"#? ?([A-Z][A-Z0-9_]+)=(\S*)", line)
        if found:
            environ[found[1]] = found[2]
    assert {"ENGINE_LOADER_CONFIG", "ENGINE_LOADER_LOADER__THREADS", "VLLM_PLUGINS"} <= set(environ)
    assert load_settings(environ=environ).settings == Settings()
