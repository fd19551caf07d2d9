"""Every program in examples/, run as its head says; what it prints is checked by values."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.moto_server import MotoServer
from tests.support.tiny_models import make_model
from tests.support.training_checkpoints import copy_bare, save_training

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
TIMEOUT_S = 280


class Here:
    """Runs an example in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, example: str, *arguments: object) -> list[str]:
        """The lines that it prints."""
        path = str(EXAMPLES / example)
        self._monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        self._capsys.readouterr()
        runpy.run_path(path, run_name="__main__")
        return self._capsys.readouterr().out.splitlines()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(monkeypatch, capsys)


def run_apart(example: str, *arguments: object, environment: Mapping[str, str] | None = None) -> list[str]:
    """The lines that an example prints in a process of its own, on standard output and error."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / example), *map(str, arguments)],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def test_every_example_is_run_here_and_listed() -> None:
    examples = {path.name for path in EXAMPLES.glob("*.py")}
    run_here = set(re.findall(r'(?:run|run_apart)\(\s*"(\w+\.py)"', Path(__file__).read_text()))
    listed = set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text()))
    assert run_here == examples
    assert listed == examples


def test_tensors_are_streamed_to_what_device_there_is(run: Here, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    lines = run("stream_to_device.py", tmp_path)
    if not torch.cuda.is_available():
        assert lines.pop(0) == "there is no GPU here: streaming to the CPU"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert lines[0] == f"2 tensors on {device}"
    assert sorted(lines[1:]) == ["torch.bfloat16: 14 bytes", "torch.float32: 60 bytes"]


def test_slices_have_the_values_of_the_tensor(run: Here, tmp_path: Path) -> None:
    matrix = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    save_file({"w": matrix}, tmp_path / "model.safetensors")
    lines = run("read_slices.py", tmp_path, "w")
    assert lines[0].startswith("w: F32 [4, 6], 96 bytes from byte ")
    assert lines[1:] == [
        f"the first half of the rows: [2, 6], sum {matrix[:2].sum():.4f}",
        f"the second half of the columns: [4, 3], sum {matrix[:, 3:].sum():.4f}",
        f"the first and the last row: [2, 6], sum {matrix[[0, -1]].sum():.4f}",
    ]


def test_a_module_is_filled_in_place(run: Here, tmp_path: Path) -> None:
    lines = run("load_into_module.py", tmp_path / "weights.safetensors")
    assert lines == ["4 tensors loaded", "same output as the trained module: True"]


def test_a_checkpoint_in_memory_is_read(run: Here) -> None:
    lines = run("checkpoint_in_memory.py")
    assert lines == ["layers.0.weight: [4, 8], mean 0", "layers.1.weight: [4, 8], mean 1"]


def test_a_training_is_resumed(run: Here, tmp_path: Path) -> None:
    lines = run("save_and_load_training.py", tmp_path / "step-3")
    assert lines == ["resumed after step 3", "the next losses are equal: True"]


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_training_becomes_safetensors(run: Here, tmp_path: Path) -> None:
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    training = save_training({"w": weight}, tmp_path / "training", "torch_save")
    lines = run("convert_training.py", training, tmp_path / "out")
    assert lines == ["1 tensors, 12 bytes, in model.safetensors", "w BF16 [2, 3]"]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["w"], weight.bfloat16())


@pytest.mark.slow
def test_a_checkpoint_is_read_by_usrbio(tmp_path: Path) -> None:
    lines = run_apart("emulate_3fs.py", tmp_path / "mount")
    assert lines == ["read by USRBIO: 4,194,304 bytes, the last value is 1.04858e+06"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_one_machine_compiled_another_one_finds(tmp_path: Path) -> None:
    def machine(name: str) -> list[str]:
        local = tmp_path / name
        local.mkdir(mode=0o700)
        environment = {
            "ENGINE_LOADER_COMPILE_CACHE__DIRECTORY": str(tmp_path / "store"),
            "TORCHINDUCTOR_CACHE_DIR": str(local / "inductor"),
            "TRITON_CACHE_DIR": str(local / "triton"),
        }
        return run_apart("restore_compile_cache.py", environment=environment)

    first, second = machine("first"), machine("second")
    assert first[:1] + first[2:] == ["restore: does_not_exist", "found in the cache: no", "save: success"]
    assert second[:1] + second[2:3] == ["restore: success", "found in the cache: yes"]
    assert second[1] == first[1]


@pytest.mark.engine
def test_what_a_rank_reads_is_explained(run: Here, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", num_hidden_layers=1)
    sizes = [tensor.nbytes for tensor in load_file(model / "model.safetensors").values()]
    lines = run("explain_rank.py", model, "--tensor-parallel-size", 2, "--rank", 1)
    totals = next(line for line in lines if line.startswith("all: "))
    in_files, kept, _ = (int(figure.replace(",", "")) for figure in re.findall(r"\d[\d,]*", totals))
    assert in_files == sum(sizes)
    small = 16 << 10  # tensors up to this size are read whole
    assert kept == sum(size if size <= small else size // 2 for size in sizes)


@pytest.mark.engine
@pytest.mark.servers
def test_a_model_is_served_from_s3(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", num_hidden_layers=1)
    tensors = load_file(model / "model.safetensors")
    bare = copy_bare(model, tmp_path / "bare")
    with MotoServer() as server:
        server.put("models", {"llama/model.safetensors": (model / "model.safetensors").read_bytes()})
        environment = {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_ENDPOINT_URL": server.url,
            "ENGINE_LOADER_COMPILE_CACHE__ENABLED": "false",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        lines = run_apart("serve_from_s3.py", bare, "s3://models/llama", "--eager", environment=environment)
    assert any(f"({len(tensors)} tensors, 1 file)" in line and "from object_store" in line for line in lines), lines
    assert any(re.fullmatch(r"\d+ tokens: '.*'|\d+ tokens: \".*\"", line) for line in lines), lines
