"""A start of `vllm serve` whose weights are cold: they are read while it imports."""

from pathlib import Path

import pytest

from engine_loader.report.phases import WARMING
from engine_loader.report.reading.timeline import read_timeline
from engine_loader.report.starts import starts_in
from tests.support.fault_server import FaultServer
from tests.support.page_cache import drop
from tests.support.tiny_models import make_model
from tests.support.vllm_server import VllmServer

pytestmark = pytest.mark.engine


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


def test_weights_of_an_object_store_are_asked_for_once_and_before_the_loader_begins(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model", shards=3, hidden_size=512, intermediate_size=1024)
    shards = sorted(model.glob("*.safetensors"))
    with FaultServer() as store:
        for path in (*shards, *model.glob("*.index.json")):
            store.objects[f"bucket/model/{path.name}"] = path.read_bytes()
        env = {"ENGINE_LOADER_START__WARM": "auto", "ENGINE_LOADER_REPORT__DIRECTORY": str(tmp_path / "starts")}
        # The engine's own imports give it time; with a template, the loader may begin before anything is there.
        env["ENGINE_LOADER_START__TEMPLATE"] = "off"
        for name, value in (
            ("WEIGHTS_URI", "s3://bucket/model"),
            ("OBJECT_STORE_ENDPOINT_URL", store.url),
            ("OBJECT_STORE_ANONYMOUS", "true"),
        ):
            env[f"ENGINE_LOADER_LOADER__{name}"] = value
        with VllmServer(model, "--load-format", "b10_3fs", env=env) as server:
            answer = server.complete("the quick brown fox", max_tokens=8)
            log = server.log
        with VllmServer(model, "--load-format", "safetensors") as server:
            assert server.complete("the quick brown fox", max_tokens=8) == answer
        size = sum(path.stat().st_size for path in shards)
        asked = sum(range_bytes(request.headers["range"]) for request in store.gets() if "range" in request.headers)
    (said,) = (line for line in log.splitlines() if "start.warm:" in line)
    assert "MiB into memory in" in said
    assert "of it were read ahead" in log
    # Beside them: headers, for the early check and by the loader.
    assert asked < 1.2 * size


def range_bytes(asked: str) -> int:
    """How many bytes a Range header asks for."""
    first, last = asked.removeprefix("bytes=").split("-")
    return int(last) - int(first) + 1
