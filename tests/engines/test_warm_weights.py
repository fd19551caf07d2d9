"""Which weights are read into the page cache while an engine imports, which are left alone, and what is said of it."""

import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine_loader.engines.common import weights_uri
from engine_loader.engines.common.reading import read_weights
from engine_loader.engines.common.start import warm_weights
from engine_loader.engines.common.start.warm_weights import (
    FilesToWarm,
    NotWarmedError,
    begin_to_warm,
    described,
    files_to_warm,
    loader_begins,
)
from engine_loader.engines.sglang import format as sglang_format
from engine_loader.loading.find import TrainingCheckpoint, find_checkpoint
from engine_loader.settings import LoaderSettings, load_settings
from engine_loader.sources.source import Source
from engine_loader.start.page_warmer import listen
from engine_loader.start.warming import WarmingAccount
from tests.support.checkpoints import checkpoint, entry, index
from tests.support.page_cache import drop
from tests.support.threefs import clean_emulator
from tests.support.training_checkpoints import save_chunked

GIB = 1 << 30
log = logging.getLogger("engine_loader.tests")


@pytest.fixture(autouse=True)
def _switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_LOADER_START__WARM", "auto")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three shards in natural order, of which the index names two."""
    for number in (10, 9, 8):
        (tmp_path / f"model-{number}.safetensors").write_bytes(checkpoint({f"t{number}": entry("U8", [1 << 20])}))
    names = {"t9": "model-9.safetensors", "t10": "model-10.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_bytes(index(names))
    return tmp_path


@contextmanager
def accepting(listening: socket.socket) -> Iterator[None]:
    """Somebody comes to whoever warms meanwhile, and is left without an answer."""
    listening.setblocking(True)
    listening.settimeout(10)
    came: list[None] = []

    def accept() -> None:
        listening.accept()[0].close()
        came.append(None)

    thread = threading.Thread(target=accept)
    thread.start()
    yield
    thread.join()
    assert came


def names_of(files: FilesToWarm) -> list[str]:
    return [os.path.basename(path) for path in files.paths]


def test_the_files_are_those_of_the_index_in_the_order_of_loading(model: Path) -> None:
    assert names_of(files_to_warm(str(model), LoaderSettings())) == ["model-9.safetensors", "model-10.safetensors"]


def test_of_a_sharded_state_checkpoint_those_of_all_ranks_are_read(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"model-rank-{rank}-part-0.safetensors").write_bytes(checkpoint({"t": entry("U8", [8])}))
    found = names_of(files_to_warm(str(tmp_path), LoaderSettings()))
    assert found == ["model-rank-0-part-0.safetensors", "model-rank-1-part-0.safetensors"]


def test_weights_uri_says_where_they_are(model: Path, tmp_path: Path) -> None:
    settings = LoaderSettings(weights_uri=str(model / "model-8.safetensors"))
    assert names_of(files_to_warm("/missing", settings)) == ["model-8.safetensors"]


def test_a_model_of_the_hub_is_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(checkpoint({"t": entry("U8", [8])}))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert files_to_warm("owner/tiny", LoaderSettings()) == FilesToWarm([str(snapshot / "model.safetensors")])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"transport": "gds"}, "they are read past this machine's memory (loader.transport: gds)"),
        ({"weights_uri": "/missing/model"}, "No such file or directory"),
    ],
)
def test_what_is_left_alone_by_the_settings(model: Path, settings: dict[str, str], reason: str) -> None:
    with pytest.raises(NotWarmedError) as told:
        files_to_warm(str(model), LoaderSettings(**settings))
    assert reason in str(told.value)


@pytest.mark.parametrize(
    ("settings", "past"), [({}, False), ({"read_mode": "direct"}, True), ({"share": "auto"}, True)]
)
def test_what_the_settings_have_read_past_the_page_cache_goes_into_memory(
    model: Path, settings: dict[str, Any], past: bool
) -> None:
    assert files_to_warm(str(model), LoaderSettings(**settings)).past_page_cache is past


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A training checkpoint of two ranks: in each file, the optimizer's large items lie behind the model's."""
    directory = tmp_path / "step-1"
    tensors = {f"model.layers.{number}.weight": torch.full((64, 1024), float(number)) for number in range(2)}
    moments = {f"optimizer.state.{name}.exp_avg": torch.zeros(1024, 1024) for name in tensors}
    save_chunked({**tensors, **moments}, directory, lambda _, tensor: [[tensor.shape[0] // 2]])
    return directory


def test_of_a_training_checkpoint_the_items_of_the_model_are_read(training: Path) -> None:
    files = files_to_warm(str(training), LoaderSettings())
    assert names_of(files) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    items = 2 * 32 * 1024 * 4
    for ranges in files.ranges.values():
        ((offset, length),) = ranges
        assert offset == 0
        assert items < length < items + (32 << 10)
    assert {os.path.basename(path) for path in files.ranges} == {"__0_0.distcp", "__1_0.distcp"}


def test_so_they_are_where_names_go_through_rules(training: Path) -> None:
    rules = {"model.layers.{n}.weight": "layers.{n}.weight", "optimizer.*": None}
    assert files_to_warm(str(training), LoaderSettings()).ranges
    assert files_to_warm(str(training), LoaderSettings(key_mapping=rules)) == files_to_warm(
        str(training), LoaderSettings()
    )


def test_whoever_warms_ends_when_a_training_checkpoint_is_read(training: Path) -> None:
    listening = listen(str(training / ".metadata"))
    assert listening is not None
    with listening, accepting(listening):
        weights = read_weights(TrainingCheckpoint(str(training)), LoaderSettings(), log=log, show_progress=False)
        assert len(list(weights)) == 2


def test_a_training_checkpoint_is_read_into_the_page_cache(training: Path, caplog: pytest.LogCaptureFixture) -> None:
    drop_all(training)
    said = warmed(training, caplog)
    assert re.match(r"start\.warm: (5\d\d\.\d KiB|1\.\d\d MiB) into the page cache in \d+\.\d s", said), said


@pytest.mark.parametrize("kind", ["safetensors", "training"])
def test_what_was_found_for_the_check_is_not_found_again(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = request.getfixturevalue({"safetensors": "model", "training": "training"}[kind])
    expected = files_to_warm(str(place), LoaderSettings())
    begun: list[FilesToWarm] = []
    found: list[str] = []

    def find(source: Source, path: str, **options: object) -> object:
        found.append(path)
        return find_checkpoint(source, path)

    monkeypatch.setattr(weights_uri, "find_checkpoint", find)
    monkeypatch.setattr(warm_weights, "find_checkpoint", find)
    settings = LoaderSettings()
    cache = load_settings().settings.compile_cache
    weights_uri.check_early(
        str(place), settings, cache, lambda weights: begun.append(files_to_warm(str(place), settings, weights))
    )
    assert (begun, found) == ([expected], [str(place)])


def test_a_model_that_is_not_here_yet_is_left_to_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotWarmedError, match="no model of this name is in the hub's local cache"):
        files_to_warm("owner/missing", LoaderSettings())


def test_files_on_threefs_go_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with clean_emulator() as emulator:
        monkeypatch.setenv("HF3FS_LIB_DIR", emulator.lib_dir)
        monkeypatch.setenv("HF3FS_EMULATOR_MOUNT", str(emulator.mount))
        (emulator.mount / "model.safetensors").write_bytes(checkpoint({"t": entry("U8", [8])}))
        try:
            assert files_to_warm(str(emulator.mount), LoaderSettings()).past_page_cache
        finally:
            (emulator.mount / "model.safetensors").unlink()


def warmed(model: object, caplog: pytest.LogCaptureFixture, settings: LoaderSettings | None = None) -> str:
    """What the log says when all has been done."""
    caplog.set_level(logging.INFO, log.name)
    before = set(threading.enumerate())
    begin_to_warm(str(model), settings or LoaderSettings(), log)
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    return "\n".join(record.getMessage() for record in caplog.records if record.name == log.name)


def drop_all(directory: Path) -> None:
    for path in directory.iterdir():
        drop(path)


def test_the_log_says_once_how_much_was_read(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    drop_all(model)
    said = warmed(model, caplog)
    assert re.fullmatch(r"start\.warm: [12]\.\d\d MiB into the page cache in \d+\.\d s", said.partition(",")[0])


def test_nothing_is_said_where_all_is_in_the_page_cache(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in model.iterdir():
        path.read_bytes()
    assert warmed(model, caplog) == ""


def test_nothing_is_done_where_it_is_off(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_LOADER_START__WARM", "off")
    drop_all(model)
    assert warmed(model, caplog) == ""


def test_an_error_does_not_reach_the_engine(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(warm_weights, "files_to_warm", fail)
    assert warmed(model, caplog) == ""


@pytest.mark.parametrize(
    ("account", "text"),
    [
        (WarmingAccount(3 * GIB, 0, 3 * GIB), "3.00 GiB into the page cache in 15.0 s"),
        (WarmingAccount(2 * GIB, GIB, 3 * GIB), "2.00 GiB into the page cache in 15.0 s, 1.00 GiB were there already"),
        (
            WarmingAccount(2 * GIB, 0, 3 * GIB, "the loader began"),
            "2.00 GiB into the page cache in 15.0 s; 1.00 GiB were left: the loader began",
        ),
        (WarmingAccount(reason="they lie in memory"), "nothing is read into the page cache: they lie in memory"),
    ],
)
def test_what_became_of_it_is_said_in_words(account: WarmingAccount, text: str) -> None:
    assert described(account, 15.0) == text


def test_whoever_warms_ends_when_weights_are_read(model: Path) -> None:
    path = str(model / "model-9.safetensors")
    listening = listen(path)
    assert listening is not None
    with listening, accepting(listening):
        weights = read_weights([path], LoaderSettings(), log=log, show_progress=False)
        assert [name for name, _ in weights] == ["t9"]


@pytest.mark.parametrize("weights", [[], ["s3://bucket/model/model.safetensors"], None, iter(["/missing/a"])])
def test_weights_that_nobody_can_warm_are_read_as_ever(weights: object) -> None:
    loader_begins(weights, LoaderSettings())


def test_sglang_begins_before_it_starts_processes(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[str] = []
    monkeypatch.setattr(warm_weights, "begin_to_warm", lambda model, *_: began.append(model))
    sglang_format._check_weights(SimpleNamespace(model_path=str(model), model_loader_extra_config=None))
    assert began == [str(model)]
