"""A start of `vllm serve` whose weights are cold: they are read while it imports."""

import os
from pathlib import Path

import pytest

from engine_loader.report.phases import WARMING
from engine_loader.report.reading.timeline import read_timeline
from engine_loader.report.starts import starts_in
from tests.support.tiny_models import make_model
from tests.support.vllm_server import VllmServer

pytestmark = pytest.mark.engine


def drop(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def environments(server: VllmServer) -> list[bytes]:
    return [Path(f"/proc/{pid}/environ").read_bytes() for pid in server.processes]


def test_cold_weights_are_read_while_the_engine_imports(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", shards=3, hidden_size=512, intermediate_size=1024)
    for path in model.glob("*.safetensors"):
        drop(path)
    env = {"ENGINE_LOADER_REPORT__DIRECTORY": str(tmp_path / "starts"), "ENGINE_LOADER_START__PLAN": "on"}
    env["ENGINE_LOADER_START__WARM"] = "auto"
    with VllmServer(model, "--load-format", "b10_3fs", env=env) as server:
        assert len(server.complete("the quick brown fox", max_tokens=4)) > 0
        (said,) = (line for line in server.log.splitlines() if "start.warm:" in line)
        assert "MiB into the page cache in" in said
        # What the first process sets is there for those that it starts.
        assert any(b"VLLM_ENABLE_STARTUP_PLAN=1" in environ for environ in environments(server))
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in server.processes]
        assert not any(b"page_warmer" in command for command in commands)
    (recorded,) = starts_in(tmp_path / "starts")
    timeline = read_timeline(recorded)
    ((process, phase),) = timeline.phases(WARMING)
    assert (process.level, phase.beside) == (0, True)
