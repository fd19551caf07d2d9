"""The command as a whole: help, version, errors, exit statuses, Ctrl-C."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine_loader import __version__
from tests.cli.running import COMMAND, invoke, on_terminal, run
from tests.support.checkpoints import checkpoint, entry

HEAVY = ("torch", "numpy", "yaml", "vllm", "safetensors", "engine_loader.settings", "engine_loader.patching")
# Typer itself imports pydantic for the options of a command, but not for the list of commands.
HEAVY_FOR_A_LIST = (*HEAVY, "pydantic", "importlib.metadata")


def test_the_installed_command_and_the_module_are_the_same() -> None:
    script = Path(sys.executable).with_name("engine-loader")
    for command in ([str(script)], COMMAND):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"engine-loader {__version__}\n"


def test_help_tells_where_to_start_and_teaches_by_examples() -> None:
    output = invoke("--help").output
    for command in ("inspect", "settings", "doctor", "bench"):
        assert command in output
    assert "engine-loader doctor" in output
    for command in (["inspect"], ["settings"], ["doctor"], ["bench", "read"]):
        output = invoke(*command, "--help").output
        assert "Examples" in output, command
        assert f"engine-loader {' '.join(command)}" in output, command


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"], ["bench", "read", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = HEAVY_FOR_A_LIST if len(arguments) == 1 else HEAVY
    code = (
        "import sys\n"
        "from engine_loader.cli import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit: pass\n"
        f"print('imported:', [name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_inspecting_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(checkpoint({"a": entry("BF16", [2, 3])}))
    code = (
        "import sys\n"
        "from engine_loader.cli import app\n"
        f"try: app(['inspect', '--check', {str(tmp_path)!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)


def test_without_a_command_the_help_is_shown() -> None:
    for arguments in ([], ["bench"]):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert "Usage" in result.output


@pytest.mark.parametrize(
    "arguments", [["inspekt"], ["inspect"], ["bench", "read", "--rounds", "0", "x"], ["doctor", "--fast"]]
)
def test_a_wrong_command_line_ends_with_2_and_says_why(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Error" in result.stderr


@pytest.mark.parametrize("command", [["inspect"], ["bench", "read"]])
def test_what_is_wrong_with_a_checkpoint_is_one_line_and_no_traceback(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    done = run(*command, tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/model.safetensors: the file is empty")


def test_an_error_is_red_on_a_terminal(tmp_path: Path) -> None:
    status, output = on_terminal(["inspect", str(tmp_path / "missing")])
    assert status == 1
    assert "\x1b[31merror: " in output
    assert "[ENOENT]" in output


def test_bad_settings_end_every_command_that_reads_them_with_2(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(checkpoint({"a": entry("U8", [8])}))
    for command in (["settings"], ["bench", "read", str(tmp_path)]):
        done = run(*command, env={"ENGINE_LOADER_LOADER__THREADS": "none"})
        assert done.returncode == 2, command
        assert done.stderr.startswith("error: ENGINE_LOADER_LOADER__THREADS: loader.threads = 'none': ")
        assert "Traceback" not in done.stderr


def test_a_reader_that_stops_reading_is_no_error_worth_a_traceback(tmp_path: Path) -> None:
    tensors = {f"tensor.{number}": entry("U8", [1]) for number in range(20_000)}
    (tmp_path / "model.safetensors").write_bytes(checkpoint(tensors))
    command = [*COMMAND, "inspect", "--tensors", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("when", ["checksums of the files", "verifying preadv", "parameters: engine_loader load_into"])
def test_ctrl_c_ends_a_benchmark_with_130(when: str, tmp_path: Path) -> None:
    """It would go on for many minutes."""
    (tmp_path / "model.safetensors").write_bytes(checkpoint({"a": entry("U8", [32 << 20])}))
    arguments = ["bench", "read", "--no-peers", "--rounds", "10000", str(tmp_path)]
    status, output = on_terminal(arguments, interrupt_at=when)
    assert status == 130
    assert "Traceback" not in output


def test_ctrl_c_ends_the_doctor_while_an_engine_starts() -> None:
    status, output = on_terminal(["doctor"], interrupt_at="checking engines")
    assert status == 130
    assert "Traceback" not in output
