"""Where a conversion writes: volumes, links, modes, what is replaced, and kills at every step."""

import json
import os
import signal
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine_loader import CheckpointError
from engine_loader.conversion import convert_checkpoint, destination
from engine_loader.loading import shards
from tests.support.children import NOBODY, ChildDied, in_child
from tests.support.mounts import bind, mount_tmpfs, mounts_work, own_mounts

OLD, NEW = {"old": torch.zeros(3)}, {"a": torch.arange(6.0), "b": torch.ones(4, 4)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    save_file(NEW, directory / "model.safetensors")
    (directory / "config.json").write_text('{"torch_dtype": "float32"}')
    return directory


def names_of(directory: Path) -> set[str]:
    return {name for path in directory.glob("*.safetensors") for name in load_file(path)}


def an_old_one(out: Path) -> Path:
    out.mkdir()
    save_file(OLD, out / "model.safetensors")
    (out / "config.json").write_text("{}")
    return out


def hidden(directory: Path) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name.startswith("."))


def in_volume(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a child with mounts of its own."""
    if not mounts_work():
        pytest.skip("this machine lets no process have mounts of its own")

    def run() -> Any:
        own_mounts()
        return work()

    return in_child(run)


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
@pytest.mark.parametrize("to", ["safetensors", "dcp"])
def test_into_the_root_of_an_empty_volume(kind: str, to: Any, model: Path, tmp_path: Path) -> None:
    """All is written on the volume, nothing beside it, and what belongs to the volume stays."""
    point, behind = tmp_path / "volume", tmp_path / "behind"
    point.mkdir()
    behind.mkdir()

    def work() -> tuple[list[str], set[int], list[str]]:
        mount_tmpfs(point) if kind == "tmpfs" else bind(behind, point)
        (point / "lost+found").mkdir()
        device = os.stat(point).st_dev
        devices = set()

        def seen(done: int, total: int) -> None:
            if done:
                devices.update(path.stat().st_dev - device for path in point.glob(".engine-loader-*/*"))

        convert_checkpoint(str(model), str(point), to=to, progress=seen)
        with pytest.raises(CheckpointError, match=r"root of a mounted volume.*name a directory below it"):
            (point / "lost+found").rmdir()
            convert_checkpoint(str(model), str(point), to=to, overwrite=True)
        return sorted(os.listdir(point)), devices, sorted(os.listdir(tmp_path))

    names, devices, beside = in_volume(work)
    weights = ["model.safetensors"] if to == "safetensors" else [".metadata", "__0_0.distcp"]
    assert names == sorted([*weights, "config.json"])
    assert devices == {0}
    assert beside == ["behind", "model", "volume"]


def test_a_volume_that_is_too_small_stays_empty(tmp_path: Path) -> None:
    point = tmp_path / "volume"
    point.mkdir()
    save_file({"w": torch.zeros(1 << 20, dtype=torch.uint8)}, tmp_path / "one.safetensors")

    def work() -> tuple[str, list[str]]:
        mount_tmpfs(point, "size=512k")
        with pytest.raises(CheckpointError) as failure:
            convert_checkpoint(str(tmp_path / "one.safetensors"), str(point))
        return str(failure.value), os.listdir(point)

    told, left = in_volume(work)
    assert "it takes 1.00 MiB" in told
    assert left == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_empty_directory_below_one_that_is_not_ours(model: Path, tmp_path: Path) -> None:
    for path in (tmp_path, *tmp_path.parents):
        if str(path).startswith(f"{tempfile.gettempdir()}/"):
            path.chmod(0o755)
    (model / "model.safetensors").chmod(0o644)  # safetensors makes it for its user alone
    out = tmp_path / "out"
    out.mkdir()
    os.chown(out, NOBODY, NOBODY)
    convert_checkpoint(str(model), str(tmp_path / "first"))  # imports what another user may not read
    in_child(lambda: convert_checkpoint(str(model), str(out)) and None, user=NOBODY)
    assert names_of(out) == set(NEW)
    assert hidden(out) == []


def test_umask_and_the_mode_of_an_existing_directory_are_kept(model: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o710)
    before = os.umask(0o077)
    try:
        convert_checkpoint(str(model), str(tmp_path / "new"))
        convert_checkpoint(str(model), str(tmp_path / "dcp"), to="dcp")
        os.umask(0o022)
        convert_checkpoint(str(model), str(closed))
    finally:
        os.umask(before)
    for directory in (tmp_path / "new", tmp_path / "dcp"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    assert stat.S_IMODE(closed.stat().st_mode) == 0o710


def test_a_link_that_leads_out_is_never_published(model: Path, tmp_path: Path) -> None:
    """Neither to a secret nor to nothing; within the directory, and into a cache of the hub, links are followed."""
    (tmp_path / "secret").write_text("hunter2")
    for target in ("../secret", str(tmp_path / "secret"), "../model/../secret", "nowhere"):
        (model / "notes.txt").symlink_to(target)
        with pytest.raises(CheckpointError, match=r"notes.txt: (this is a link that leads out|could not open)|no such"):
            convert_checkpoint(str(model), str(tmp_path / "out"))
        (model / "notes.txt").unlink()
        assert sorted(os.listdir(tmp_path)) == ["model", "secret"]

    (model / "..data").mkdir()
    (model / "..data" / "tokenizer.json").write_text("{}")
    (model / "tokenizer.json").symlink_to("..data/tokenizer.json")
    convert_checkpoint(str(model), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"

    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, name in enumerate(("model.safetensors", "config.json")):
        (repository / "blobs" / str(number)).write_bytes((model / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    convert_checkpoint(str(snapshot), str(tmp_path / "hub"))
    assert sorted(os.listdir(tmp_path / "hub")) == ["config.json", "model.safetensors"]


def test_a_large_file_beside_the_weights_is_copied_and_one_without_room_is_told_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 40_000
    (model / "consolidated.nemo").write_bytes(content)
    monkeypatch.setattr(shards, "MAX_INDEX_BYTES", 1 << 20)  # the limit for what is parsed as a whole
    convert_checkpoint(str(model), str(tmp_path / "out"))
    assert (tmp_path / "out" / "consolidated.nemo").read_bytes() == content
    free = os.statvfs(tmp_path)
    try:
        os.truncate(model / "consolidated.nemo", free.f_frsize * free.f_bavail + (1 << 40))
    except OSError:
        return  # this file system has no files as large
    with pytest.raises(CheckpointError, match=r"it takes .* are free there"):
        convert_checkpoint(str(model), str(tmp_path / "other"))
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


def no_weights(out: Path) -> None:
    (out / "config.json").write_text("{}")
    (out / "letter.txt").write_text("dear")


def with_a_directory(out: Path) -> None:
    save_file(OLD, out / "model.safetensors")
    (out / "photographs").mkdir()


def no_safetensors(out: Path) -> None:
    (out / "model.safetensors").write_bytes(b"no header")


def an_empty_metadata(out: Path) -> None:
    (out / ".metadata").write_bytes(b"")


@pytest.mark.parametrize("make", [no_weights, with_a_directory, no_safetensors, an_empty_metadata])
def test_what_no_conversion_wrote_is_not_overwritten(make: Callable[[Path], None], model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    make(out)
    before = sorted(os.listdir(out))
    with pytest.raises(CheckpointError, match=r"this is not overwritten, because it .*delete it yourself"):
        convert_checkpoint(str(model), str(out), overwrite=True)
    assert sorted(os.listdir(out)) == before
    assert hidden(tmp_path) == []


_STEPS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def killed_at(step: int, work: Callable[[], Any]) -> bool:
    """Kill a child that does ``work`` before its ``step``-th change of names; whether it came so far."""

    def run() -> None:
        left = step

        def count(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            if event in _STEPS or event == "engine_loader.exchanged":
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work()

    try:
        in_child(run)
    except ChildDied as death:
        assert "SIGKILL" in str(death)
        return True
    return False


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two_renames"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new(
    exchanges: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = destination.exchange

    def exchange(one: Path, other: Path) -> bool:
        done = exchanges and real(one, other)
        sys.audit("engine_loader.exchanged")
        return done

    if exchanges and not _can_exchange(tmp_path):
        pytest.skip("this file system cannot exchange names")
    monkeypatch.setattr(destination, "exchange", exchange)
    monkeypatch.setattr(destination, "_LEFT_OVER_S", 0.0)
    seen = set()
    for step in range(40):
        out = an_old_one(tmp_path / f"out{step}")
        went_so_far = killed_at(step, lambda out=out: convert_checkpoint(str(model), str(out), overwrite=True))
        if exchanges or out.exists():
            assert names_of(out) in (set(OLD), set(NEW))
        seen.add(frozenset(names_of(out)))
        # The next conversion finds the old or the new, too, and leaves nothing else behind.
        with pytest.raises(CheckpointError, match="the destination holds something"):
            convert_checkpoint(str(model), str(out))
        assert names_of(out) in (set(OLD), set(NEW))
        convert_checkpoint(str(model), str(out), overwrite=True)
        assert names_of(out) == set(NEW)
        assert hidden(tmp_path) == []
        if not went_so_far:
            break
    assert {frozenset(OLD), frozenset(NEW)} <= seen
    assert not went_so_far


def test_a_kill_in_a_volume_leaves_no_half_of_a_checkpoint(model: Path, tmp_path: Path) -> None:
    """What makes a directory a checkpoint comes last, and the next conversion takes what is left for its own."""
    point = tmp_path / "volume"
    point.mkdir()
    shards = {f"t{number}": torch.full((10,), float(number)) for number in range(3)}
    for name, tensor in shards.items():
        save_file({name: tensor}, model / f"{name}.safetensors")
    (model / "model.safetensors").unlink()
    weight_map = {name: f"{name}.safetensors" for name in shards}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def work() -> list[list[str]]:
        found = []
        for step in range(20):
            mount_tmpfs(point)
            killed = killed_at(step, lambda: convert_checkpoint(str(model), str(point), max_shard_bytes=40))
            found.append(sorted(name for name in os.listdir(point) if not name.startswith(".")))
            if not killed:
                break
        return found

    found = in_volume(work)
    assert found[0] == []
    assert len(found[-1]) == 5
    for names in found[:-1]:
        if "config.json" in names or "model.safetensors.index.json" in names:
            assert len([name for name in names if name.endswith(".safetensors")]) == 3


def _can_exchange(directory: Path) -> bool:
    one, other = directory / "one", directory / "other"
    one.mkdir()
    other.mkdir()
    try:
        return destination.exchange(one, other)
    finally:
        one.rmdir()
        other.rmdir()
