"""Saved to S3 by two processes, loaded by one, two and four: sharded tensors come back, bit for bit."""

import os
from pathlib import Path

import pytest
import torch

from tests.support.object_stores import CREDENTIALS
from tests.support.s3_server import S3Server

from ..ranks import full_tensors, run
from .buckets import keys, load
from .ranks import NAMES, url_of

MODULE = "tests.dcp.s3.ranks"


@pytest.fixture(scope="module")
def saved_by_two(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its name is that of the bucket where two processes saved it, and loaded it themselves."""
    directory = tmp_path_factory.mktemp("saved-by-two-")
    s3.make_bucket(directory.name)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": s3.url}.items():
            patch.setenv(name, value)
        run("save", 2, directory, module=MODULE)
    return directory


@pytest.mark.skipif("EXTENDED_TESTS" not in os.environ, reason="takes half a minute: make test-object-stores")
@pytest.mark.usefixtures("on_s3")
def test_it_is_loaded_by_twice_as_many_processes(saved_by_two: Path) -> None:
    run("load", 4, saved_by_two, module=MODULE)


@pytest.mark.usefixtures("on_s3")
@pytest.mark.parametrize("name", NAMES)
def test_it_is_loaded_by_one_process(saved_by_two: Path, name: str) -> None:
    full = full_tensors()
    empty = {**{key: torch.zeros_like(value) for key, value in full.items()}, "step": 0}
    loaded = load(empty, url_of(saved_by_two, name))
    assert loaded.pop("step") == 12
    assert all(torch.equal(loaded[key], full[key]) for key in full)


@pytest.mark.usefixtures("on_s3")
def test_the_names_are_those_of_the_strategy_and_replacing_left_nothing_behind(saved_by_two: Path) -> None:
    assert keys(url_of(saved_by_two, "plain")) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    replaced = ["0000000000/epoch_3/__0_1.distcp", "1000000000/epoch_3/__1_1.distcp"]
    assert keys(url_of(saved_by_two, "hex")) == [".metadata", *replaced]
    binary = ["0000000000/__0_0.distcp", "1000000000/__1_0.distcp"]
    assert keys(url_of(saved_by_two, "async")) == [".metadata", *binary]
    alone = ["__0.metadata", "__0_0.distcp", "__1.metadata", "__1_0.distcp"]
    assert keys(url_of(saved_by_two, "alone")) == alone
