"""Every command in README and docs is run here, or names the test that runs it, or why none does. All
are checked against what there is: options of engine-loader, targets of make, extras, settings."""

import ast
import json
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file

from engine_loader.cli import app
from engine_loader.settings import load_settings
from tests.cli.running import invoke
from tests.support.training_checkpoints import save_training

from .commands import ROOT, Command, commands

SERVE = ("tests/engines/vllm/test_serve.py", "test_a_llama_in_shards_answers_as_with_vllms_loader")
BUCKET = ("tests/engines/vllm/test_weights_uri.py", "test_a_server_answers_as_with_weights_on_disk")
SGLANG = ("tests/engines/sglang/test_serve.py", "test_tokens_parameters_and_updates_are_as_with_sglangs_own_loader")
CACHE = "tests/compile_cache/test_cli.py"
REPORT = "tests/cli/test_report.py"
SECURITY = ("tests/compile_cache/trust/test_security_doc.py", "test_replacing_a_key_without_a_miss")

RUN_ELSEWHERE: dict[str, tuple[str, str]] = {
    "vllm serve checkpoints/": (
        "tests/engines/vllm/test_training_checkpoints.py",
        "test_a_server_answers_from_a_training_on_disk_as_from_safetensors",
    ),
    "vllm serve s3://": (
        "tests/engines/vllm/test_model_in_a_bucket.py",
        "test_a_server_answers_as_with_the_model_on_disk",
    ),
    "vllm serve /models/llama --load-format b10_3fs --model-loader-extra-config": BUCKET,
    "vllm serve": SERVE,
    "python -m sglang.launch_server": SGLANG,
    "engine-loader explain-load": (
        "tests/cli/test_explain_load.py",
        "test_explain_load_says_what_a_rank_reads_and_reshard_writes_just_that",
    ),
    "engine-loader bench read": ("tests/cli/test_bench.py", "test_a_person_sees_a_table_with_the_conditions_or_a_page"),
    "engine-loader report compare": (REPORT, "test_a_slower_phase_is_named_and_is_an_exit_status"),
    "engine-loader report list": (REPORT, "test_starts_are_listed"),
    "engine-loader report --json": (REPORT, "test_json_has_the_critical_path_and_the_advice"),
    "engine-loader report --html": (REPORT, "test_a_trace_and_a_page_are_written"),
    "engine-loader report --trace": (REPORT, "test_a_trace_and_a_page_are_written"),
    "engine-loader report": (REPORT, "test_the_last_start_is_shown_with_its_waterfall_and_what_would_help"),
    "engine-loader warm": ("tests/cli/test_warm.py", "test_a_cold_model_is_read_into_the_page_cache"),
    "engine-loader doctor": ("tests/cli/doctor/test_doctor.py", "test_a_person_sees_marks_and_how_to_mend"),
    "engine-loader emulate-3fs": ("tests/examples/test_examples.py", "test_a_checkpoint_is_read_by_usrbio"),
    "engine-loader convert s3://": ("tests/conversion/test_convert.py", "test_a_prefix_of_an_object_store_is_a_source"),
    "engine-loader convert": ("tests/cli/test_convert.py", "test_a_training_becomes_a_model_and_a_training_again"),
    "engine-loader compile-cache deny": (
        "tests/compile_cache/trust/test_security_doc.py",
        "test_denying_a_pack",
    ),
    "engine-loader compile-cache quarantine": (CACHE, "test_a_pack_is_put_into_quarantine_and_taken_out"),
    "engine-loader compile-cache keys": SECURITY,
    "engine-loader compile-cache keygen": SECURITY,
    "engine-loader compile-cache resign": SECURITY,
    "engine-loader compile-cache adopt": (
        "tests/compile_cache/test_ownership.py",
        "test_a_directory_that_is_not_empty_is_refused_until_it_is_adopted",
    ),
    "engine-loader compile-cache": (CACHE, "test_save_clear_load"),
    "engine-loader inspect --check s3://": ("tests/sources/object_store/test_reading.py", "test_inspect"),
}
"""Beginning of a command -> the test that runs one like it; the longest beginning counts."""

NOT_RUN = {
    "pip install": "no registry has this package while it is tested: make test-wheel installs the wheel",
    "make": "these run the tests, or are run by hand; the target is looked up",
    "export": "it sets variables, which are checked as settings",
    **dict.fromkeys(
        (
            "python3.11 -m venv",
            ". venv/bin/activate",
            "pip uninstall",
            "python -m vllm.entrypoints.openai.api_server",
            "curl http://127.0.0.1:8000",
            "rm -r",
            "moto_server",
            "engine-loader convert tiny-llama",
            "engine-loader convert step-0 converted",
            "engine-loader inspect converted --check",
            "engine-loader inspect s3://models/tiny-llama --check",
        ),
        "make test-quick-start runs these lines of docs/quick-start.md, with the wheel",
    ),
    "docker build": "there is no builder here; hadolint reads the file (tests/test_kubernetes.py)",
    "kubectl": "there is no cluster here; the manifests are validated (tests/test_kubernetes.py)",
    "engine-loader patch": "it would change the installed engine; tests/test_patching.py applies patches to copies",
}
"""Beginning of a command -> why no test runs it."""

RUN_HERE = {
    "engine-loader inspect model/ --check": "sound: the header of 1 file",
    "engine-loader settings": "loader.threads",
    "engine-loader convert step-1000/ out/": "out/: 1 file, 1 tensors, 64 B",
    "engine-loader patch list": "vllm-0.32-aot-finalize",
    "engine-loader compile-cache info": "environment",
    "engine-loader compile-cache list": "is empty",
    "engine-loader compile-cache explain": "",
    "engine-loader compile-cache verify": "is empty",
    "engine-loader compile-cache prune --dry-run": "",
    "engine-loader compile-cache prune": "",
    "engine-loader compile-cache keygen compile-cache.key": "compile-cache.key",
}
"""Commands that are run as they are written, and a part of what they print."""


def longest(command: Command, beginnings: dict[str, Any]) -> str | None:
    found = [one for one in beginnings if f"{command} ".startswith(f"{one}") or str(command) == one]
    return max(found, key=len) if found else None


@cache
def functions_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def of(program: str) -> list[Command]:
    return [command for command in commands() if " ".join(command.words).startswith(f"{program} ")]


def test_there_are_fifty() -> None:
    assert len(commands()) >= 50


@pytest.mark.parametrize("command", commands(), ids=str)
def test_a_command_is_run_or_it_is_said_why_not(command: Command) -> None:
    if str(command) in RUN_HERE:
        return
    elsewhere = longest(command, RUN_ELSEWHERE)
    reason = longest(command, NOT_RUN)
    assert elsewhere or reason, f"{command.document}: no test runs {command}"
    if elsewhere:
        file, test = RUN_ELSEWHERE[elsewhere]
        assert test in functions_in(file)


@pytest.mark.parametrize("command", of("engine-loader"), ids=str)
def test_its_options_exist(command: Command) -> None:
    node: Any = typer.main.get_command(app)
    words = list(command.words[1:])
    while words and words[0] in getattr(node, "commands", {}):
        node = node.commands[words.pop(0)]
    node = getattr(node, "commands", {}).get("show", node)  # of `report`, what is shown by default
    assert not hasattr(node, "commands"), f"{command} is not a command"
    known = {option for parameter in node.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("command", [*of("vllm serve"), *of("python -m sglang.launch_server")], ids=str)
def test_an_engine_is_given_a_format_and_options_that_exist(command: Command) -> None:
    words = list(command.words)
    assert words[words.index("--load-format") + 1] == "b10_3fs"
    if "--model-loader-extra-config" in words:
        load_settings(json.loads(words[words.index("--model-loader-extra-config") + 1]), {})


@pytest.mark.parametrize("command", of("make"), ids=str)
def test_its_target_exists(command: Command) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in command.words[1:] if "=" not in word} <= targets


@pytest.mark.parametrize("command", of("pip install"), ids=str)
def test_its_extras_exist(command: Command) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"engine-loader\[([\w,]+)\]", str(command))
    assert {extra for names in named for extra in names.split(",")} <= set(extras)


@pytest.mark.parametrize("command", of("export"), ids=str)
def test_its_variables_are_settings(command: Command) -> None:
    variables = dict(word.split("=", 1) for word in command.words[1:])
    ours = {name: value for name, value in variables.items() if name.startswith(("ENGINE_LOADER_", "B10FS", "HF3FS"))}
    load_settings(environ=ours)


@pytest.mark.parametrize("line", RUN_HERE)
def test_it_runs_as_it_is_written(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(str(command) == line for command in commands()), "no document has it any more"
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    save_file({"w": torch.zeros(4, 4)}, "model/model.safetensors")
    save_training({"w": torch.zeros(4, 4)}, tmp_path / "step-1000", "torch_save", prefix="")
    environment = {
        "HOME": str(tmp_path),
        "ENGINE_LOADER_COMPILE_CACHE__DIRECTORY": str(tmp_path / "store"),
        "VLLM_CACHE_ROOT": str(tmp_path / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }
    done = invoke(*shlex.split(line)[1:], env=environment)
    assert done.exit_code == 0, done.output
    assert RUN_HERE[line] in done.output
