"""Saved by two processes, loaded by one, two and four: sharded tensors come back, bit for bit."""

import os
from pathlib import Path

import pytest
import torch

from .ranks import full_tensors, run
from .states import load


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes saved it, and loaded it themselves."""
    directory = tmp_path_factory.mktemp("saved_by_two")
    run("save", 2, directory)
    return directory


@pytest.mark.slow
def test_it_is_loaded_by_twice_as_many_processes(saved_by_two):
    run("load", 4, saved_by_two)


@pytest.mark.parametrize("name", ["ours", "safetensors", "torchs", "async"])
def test_it_is_loaded_by_one_process(saved_by_two, name):
    full = full_tensors()
    loaded = load({**{key: torch.zeros_like(value) for key, value in full.items()}, "step": 0}, saved_by_two / name)
    assert loaded.pop("step") == 12
    assert all(torch.equal(loaded[key], full[key]) for key in full)


def test_replacing_it_left_no_file_behind(saved_by_two):
    names = sorted(os.listdir(saved_by_two / "ours"))
    assert names == [".metadata", "__0_1.distcp", "__1_1.distcp"]
