"""Mapped pages: as fast as a mapping, without its dangers."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_loader import CheckpointError, open_checkpoint
from engine_loader.report.load_report import LoadReport


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {f"layer.{number}": torch.randn(256, 512) for number in range(8)}
    tensors["a.odd"] = torch.arange(3, dtype=torch.uint8)
    tensors["scale"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 7)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def mapped_bytes(path: Path, **options: object) -> int:
    report = LoadReport()
    with open_checkpoint(path, **options) as opened:
        for _ in opened.tensors(report=report):
            pass
    return report.modes.get("mapped", 0)


def test_a_file_in_the_page_cache_is_mapped_and_equal(checkpoint: Path) -> None:
    expected = load_file(checkpoint)
    assert mapped_bytes(checkpoint) == sum(tensor.nbytes for tensor in expected.values())
    with open_checkpoint(checkpoint, read_mode="mapped") as opened:
        loaded = dict(opened.tensors())
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_it_is_not_mapped_when_told_so_or_read_by_the_python_engine(checkpoint: Path) -> None:
    assert mapped_bytes(checkpoint, read_mode="buffered") == 0
    assert mapped_bytes(checkpoint, engine="python") == 0


def test_writing_into_a_tensor_reaches_neither_file_nor_neighbours(checkpoint: Path) -> None:
    expected, content = load_file(checkpoint), checkpoint.read_bytes()
    with open_checkpoint(checkpoint, read_mode="mapped") as opened:
        for name, tensor in opened.tensors():
            assert torch.equal(tensor, expected[name])
            tensor.fill_(1)
    assert checkpoint.read_bytes() == content


def test_what_is_kept_does_not_depend_on_the_file(checkpoint: Path) -> None:
    expected = load_file(checkpoint)
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    with open_checkpoint(checkpoint, read_mode="mapped") as opened:
        kept = dict(opened.tensors())
    with checkpoint.open("r+b") as file:
        file.write(b"\xff" * checkpoint.stat().st_size)
    assert all(torch.equal(kept[name], tensor) for name, tensor in expected.items())
    with checkpoint.open("r+b") as file:
        file.truncate(0)
    assert all(torch.equal(kept[name], tensor) for name, tensor in expected.items())


def test_what_is_kept_of_an_abandoned_stream_does_not_depend_on_the_file(checkpoint: Path) -> None:
    expected = load_file(checkpoint)
    with open_checkpoint(checkpoint, read_mode="mapped") as opened:
        stream = opened.tensors()
        name, kept = next(stream)
        stream.close()
    value = expected[name].clone()
    del expected
    with checkpoint.open("r+b") as file:
        file.truncate(0)
    assert torch.equal(kept, value)


@pytest.mark.parametrize("keep", [False, True])
def test_a_file_cut_short_meanwhile_is_an_error_and_not_the_end_of_the_process(keep: bool, checkpoint: Path) -> None:
    code = f"""
        import faulthandler, os, sys
        faulthandler.enable()
        import torch
        from engine_loader import CheckpointError, open_checkpoint
        held = []
        try:
            with open_checkpoint({str(checkpoint)!r}, read_mode="mapped") as opened:
                for number, (name, tensor) in enumerate(opened.tensors()):
                    if number == 3:
                        os.truncate({str(checkpoint)!r}, 4096)
                    if {keep}:
                        held.append(tensor)
                    else:
                        tensor.sum()
        except CheckpointError as error:
            print("ERROR", error)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"ERROR {checkpoint}" in result.stdout
    assert "cut short" in result.stdout or "ended here" in result.stdout


def test_a_bus_error_elsewhere_still_ends_the_process(checkpoint: Path) -> None:
    code = f"""
        import mmap, os
        from engine_loader import open_checkpoint
        with open_checkpoint({str(checkpoint)!r}, read_mode="mapped") as opened:
            stream = opened.tensors()
            next(stream)
            other = {str(checkpoint)!r} + ".other"
            open(other, "wb").write(bytes(8192))
            fd = os.open(other, os.O_RDWR)
            pages = mmap.mmap(fd, 8192)
            os.ftruncate(fd, 0)
            pages[5000]
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, capture_output=True)
    assert result.returncode == -7


def test_a_gap_of_unwanted_tensors_is_leapt_over(checkpoint: Path) -> None:
    expected = load_file(checkpoint)
    with open_checkpoint(checkpoint, read_mode="mapped") as opened:
        loaded = dict(opened.tensors(["layer.0", "layer.7"]))
    assert all(torch.equal(loaded[name], expected[name]) for name in ("layer.0", "layer.7"))


def test_a_file_that_shrank_before_it_is_mapped_is_an_error(checkpoint: Path) -> None:
    with open_checkpoint(checkpoint, read_mode="mapped") as opened:
        with checkpoint.open("r+b") as file:
            file.truncate(5000)
        with pytest.raises(CheckpointError, match="it had"):
            list(opened.tensors())
