"""What the ranks of a node read together, and that nobody's fault is another's."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from engine_loader.bench import page_cache
from engine_loader.transfer.modes import resident_share
from engine_loader.transfer.window.meeting import meeting_directory

from ...transfer.native.building import compile_shim
from .rank import Options, checksum, part_of
from .rounds import TIMEOUT_S, make_checkpoint

ROUNDS = 500 if os.environ.get("EXTENDED_TESTS") else 12


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which only the ranks of this test meet."""
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    return runtime / "engine-loader"


def start(rank: Options, environment: dict[str, str]) -> subprocess.Popen[str]:
    """A rank in a process of its own, ready to load."""
    command = [sys.executable, "-m", "tests.loading.sharing.rank", json.dumps(vars(rank))]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=os.environ | environment, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


def go(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


def end(*children: subprocess.Popen[str]) -> None:
    """Kill ranks that have not ended, and close their pipes."""
    for child in children:
        child.kill()
        child.communicate()


def load_together(ranks: list[Options]) -> list[dict[str, Any]]:
    """The answers of ranks that load at the same time, each in a process of its own."""
    children = [start(rank, {}) for rank in ranks]
    answers = []
    for child in children:
        go(child)
    try:
        for child in children:
            out, _ = child.communicate(timeout=120)
            answers.append(json.loads(out))
    finally:
        end(*children)
    return answers


def sums_of(path: Path, ranks: int) -> list[dict[str, str]]:
    """What each of so many ranks is to have."""
    tensors = load_file(path)
    return [
        {name: checksum(part_of(name, tensor, rank, ranks)) for name, tensor in tensors.items()}
        for rank in range(ranks)
    ]


def test_what_several_ranks_need_is_read_once(tmp_path: Path, place: Path) -> None:
    path = tmp_path / "model.safetensors"
    make_checkpoint(path, layers=12)
    settings = {"read_mode": "direct"}
    shared = settings | {"share": "auto"}
    found = load_together([Options([str(path)], rank, 3, settings=shared, meet=3) for rank in range(3)])
    alone = load_together([Options([str(path)], rank, 3, settings=settings | {"share": "off"}) for rank in range(3)])
    assert [one["sums"] for one in found] == [one["sums"] for one in alone]
    size = path.stat().st_size
    assert sum(one["read"] for one in found) < 1.1 * size < 2 * size < sum(one["read"] for one in alone)
    assert all(one["why_not"] == "" for one in found)
    assert any(re.search("of what 3 ranks share, read .* had [1-9].* from others$", one["notes"][0]) for one in found)
    assert [entry.name for entry in place.iterdir()] == ["lock"]


def test_what_a_rank_claimed_that_dies_is_read_by_who_waits(tmp_path: Path, place: Path) -> None:
    path, words = tmp_path / "model.safetensors", tmp_path / "faults"
    make_checkpoint(path)
    slow_us = 60_000_000  # each read of the first rank
    words.write_bytes(struct.pack("7I", 0, 0, 0, 0, 0, 0, slow_us) + bytes(36))
    environment = {"LD_PRELOAD": str(compile_shim(tmp_path)), "ENGINE_LOADER_FAULTS": str(words)}
    settings = {"read_mode": "direct", "share": "auto", "share_timeout_s": 60.0}  # a death is seen at once
    first = start(Options([str(path)], 0, 2, settings=settings), environment)
    second = start(Options([str(path)], 1, 2, settings=settings), {})
    try:
        go(first)
        while struct.unpack("16I", words.read_bytes())[12] < 2:  # reads in flight
            assert first.poll() is None
            time.sleep(0.02)
        go(second)
        while sum(entry.name.startswith("window-") for entry in place.iterdir()) < 2:  # both have joined
            time.sleep(0.01)
        first.kill()
        found = json.loads(second.communicate(timeout=120)[0])
    finally:
        end(first, second)
    assert found["taken_over"] > 0
    assert found["sums"] == sums_of(path, 2)[1]


def test_what_a_stopped_rank_claimed_is_read_by_who_waits_and_it_ends_right_when_it_goes_on(
    tmp_path: Path, place: Path
) -> None:
    path, words = tmp_path / "model.safetensors", tmp_path / "faults"
    make_checkpoint(path)
    words.write_bytes(struct.pack("7I", 0, 0, 0, 0, 0, 0, 200_000) + bytes(36))
    environment = {"LD_PRELOAD": str(compile_shim(tmp_path)), "ENGINE_LOADER_FAULTS": str(words)}
    settings: dict[str, Any] = {"read_mode": "direct", "share": "auto", "share_timeout_s": 1.0}
    stopped = start(Options([str(path)], 0, 2, settings=settings, meet=2, fall=signal.SIGSTOP), environment)
    # It pauses, so that the other one claims blocks, too.
    waiting = start(Options([str(path)], 1, 2, settings=settings, meet=2, pause_s=0.5), {})
    try:
        for child in (stopped, waiting):
            go(child)
        _, status = os.waitpid(stopped.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        found = json.loads(waiting.communicate(timeout=120)[0])
        words.write_bytes(bytes(64))
        stopped.send_signal(signal.SIGCONT)
        late = json.loads(stopped.communicate(timeout=120)[0])
    finally:
        end(stopped, waiting)
    assert found["taken_over"] > 0
    assert found["longest_wait_ns"] / 1e9 >= settings["share_timeout_s"]
    assert [late["sums"], found["sums"]] == sums_of(path, 2)
    assert [entry.name for entry in place.iterdir()] == ["lock"]


def test_a_full_window_waits_for_the_last_rank_that_wants_its_blocks(tmp_path: Path, place: Path) -> None:
    path, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    make_checkpoint(path, layers=12)
    make_checkpoint(other, layers=1)
    settings = {"read_mode": "direct", "share": "auto", "share_bytes": 16 << 20, "share_timeout_s": 60.0}
    ranks = [Options([str(path)], rank, 2, settings=settings, meet=3, pause_s=0.05 * rank) for rank in range(2)]
    # The third one loads other files, which nobody else wants.
    found = load_together([*ranks, Options([str(other)], 0, 2, settings=settings, meet=3, pause_s=1.0)])
    assert [one["sums"] for one in found[:2]] == sums_of(path, 2)
    assert sum(one["read"] for one in found[:2]) < 1.05 * path.stat().st_size
    # A block of which rank 0 wants nothing may find no room: it does not wait for what rank 1 itself still wants.
    assert max(one["left_bytes"] for one in found) < 4096
    # Nobody has all of the other files' blocks, nor of that one where it is read into the window.
    blocks_of_other = 3
    assert max(one["evicted"] for one in found) <= blocks_of_other + 1


def test_ranks_that_go_through_the_same_blocks_read_none_past_a_window_that_is_full(
    tmp_path: Path, place: Path
) -> None:
    path = tmp_path / "model.safetensors"
    make_checkpoint(path, layers=12)
    settings: dict[str, Any] = {"read_mode": "direct", "share": "auto", "share_bytes": 16 << 20}
    # Both have met before the first block is wanted that the window has no room for.
    ranks = [Options([str(path)], rank, 2, settings=settings, meet=2) for rank in range(2)]
    for _ in range(3):
        found = load_together(ranks)
        assert [one["sums"] for one in found] == sums_of(path, 2)
        assert max(one["left_bytes"] for one in found) < 4096


def test_a_full_window_gives_up_what_only_ranks_want_that_have_not_come(tmp_path: Path, place: Path) -> None:
    path = tmp_path / "model.safetensors"
    make_checkpoint(path, layers=12)
    settings = {"read_mode": "direct", "share": "auto", "share_bytes": 16 << 20, "share_timeout_s": 60.0}
    (found,) = load_together([Options([str(path)], 1, 2, node=2, settings=settings)])
    assert found["sums"] == sums_of(path, 2)[1]
    assert found["evicted"] > 0
    assert found["left_bytes"] == 0
    assert "1 of them met" in found["notes"][0]
    assert found["read"] < path.stat().st_size  # what is rank 0's alone was not


@pytest.mark.timeout(300 + 3 * ROUNDS)
def test_faults_of_some_ranks_leave_the_others_right(tmp_path: Path, place: Path) -> None:
    shim = compile_shim(tmp_path)
    words = tmp_path / "faults"
    words.write_bytes(bytes(64))
    environment = {"LD_PRELOAD": str(shim), "ENGINE_LOADER_FAULTS": str(words)}
    command = [sys.executable, "-m", "tests.loading.sharing.rounds", str(tmp_path), str(ROUNDS), "1"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["right"] > ROUNDS and found["from others"] and found["ended"], found
    # Kills fall into reads: what those had claimed is read by others.
    assert found["ended reading"] and found["taken over"] > (ROUNDS // 50), found
    # On a busy machine a rank may notice late that its time is over.
    assert found["longest_wait_s"] < 10 * TIMEOUT_S, found
    assert [name for name in os.listdir("/dev/shm") if "engine-loader" in name and "3fs" not in name] == []
    assert [entry.name for entry in place.iterdir()] == ["lock"], "sockets of killed ranks are left"


def test_a_directory_that_others_may_enter_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o755)
    runtime.chmod(0o755)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    directory, _ = meeting_directory()
    assert directory != runtime / "engine-loader"


def test_ranks_that_cannot_meet_share_by_the_page_cache(tmp_path: Path, place: Path) -> None:
    path = tmp_path / "model.safetensors"
    make_checkpoint(path, layers=12)
    page_cache.drop([str(path)])
    with path.open("rb") as file:
        if not (resident_share(file.fileno(), path.stat().st_size) or 0) < 0.05:
            pytest.skip("files here lie in memory")
    place.mkdir(mode=0o700)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        settings = {"share": "auto", "share_timeout_s": 0.1}
        found = load_together([Options([str(path)], rank, 3, settings=settings) for rank in range(3)])
    assert [one["sums"] for one in found] == sums_of(path, 3)
    # For one that comes late, all lies in the page cache: there is nothing to be shared.
    assert any("nothing shared" in one["why_not"] for one in found)
    assert not any(one.get("shared_bytes") for one in found)
    assert sum(one["from_disk"] for one in found) < 1.1 * path.stat().st_size < sum(one["read"] for one in found)
