"""Starts the real SGLang on CPU, in an environment of its own (make venv-sglang), and asks it for completions.

with SglangServer("0.5.23", model_dir, "--load-format", "b10_3fs") as server:
    text = server.complete("Once upon a time", max_tokens=8)
"""

import json
import os
import subprocess
import urllib.error
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.vllm_server import VllmServer

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).resolve().parent / "sglang" / "probe"
ONE_CORE = "1"
# One core for each rank.
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
WITHOUT_PLUGINS = ("0.5.9", "0.5.10")


def python_of(version: str) -> Path:
    """The Python of the environment that has this version of SGLang."""
    return ROOT / f".venv-sglang-{version}" / "bin" / "python"


@contextmanager
def patched(version: str) -> Iterator[None]:
    """Within, the version loads plugins, by `engine-loader patch` where it does not do so by itself."""
    name = f"sglang-{version}-plugin"
    if version not in WITHOUT_PLUGINS:
        yield
        return
    change(version, "apply", name)
    try:
        yield
    finally:
        change(version, "revert", name)


def change(version: str, action: str, *args: str) -> str:
    """What `engine-loader patch` says in the environment of a version."""
    command = [str(python_of(version).with_name("engine-loader")), "patch", action, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout


class SglangServer(VllmServer):
    """A server of one version of SGLang; its arguments are as VllmServer's.

    Without ``eager`` it sends itself requests before it is ready. (SGLang cannot compile the model with the attention
    that there is on a CPU without its own kernels.) Tensor-parallel 2 needs ``env=TWO_RANKS``.
    """

    PROGRAM = "SGLang"
    START_TIMEOUT_S = 600.0  # half a minute on two idle cores; only a server that hangs shall meet it
    STOP_TIMEOUT_S = 3.0  # on SIGTERM it waits for its scheduler, which does not end by itself
    ENVIRONMENT: Mapping[str, str | None] = {
        "SGLANG_USE_CPU_ENGINE": "1",
        # With as many threads as cores, the scheduler, which polls, and the threads of the kernels would wait for each
        # other.
        "SGLANG_CPU_OMP_THREADS_BIND": ONE_CORE,
        "OMP_NUM_THREADS": ONE_CORE,
        "HF_HUB_OFFLINE": "1",
        "ENGINE_LOADER_COMPILE_CACHE__ENABLED": "false",  # those of the cache turn it on
        "VIRTUAL_ENV": None,
    }

    def __init__(self, version: str, model_dir: str | os.PathLike[str], *args: str, **options: Any) -> None:
        self.version = version
        options.setdefault("start_timeout_s", self.START_TIMEOUT_S)
        if version == "0.5.11":  # else it wants the port plus 10000 to be one, also where it serves no gRPC
            options["env"] = {"SGLANG_GRPC_PORT": "10000", **(options.get("env") or {})}
        super().__init__(model_dir, *args, **options)

    def _make_command(self, model_dir: str | os.PathLike[str], args: tuple[str, ...], *, eager: bool) -> list[str]:
        command = [str(python_of(self.version)), "-m", "sglang.launch_server", "--model-path", os.fspath(model_dir)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu", "--disable-overlap-schedule"]
        command += ["--max-total-tokens", "4096", "--max-running-requests", "4", "--context-length", "256"]
        if eager and self.version != "0.5.9":  # that compiles at the first request, which would take too long for one
            command.append("--skip-server-warmup")
        return [*command, *args]

    def update_weights(self, model_dir: Path, load_format: str | None = None) -> tuple[bool, str]:
        """Whether the server took other weights in the place of its own, and what it said."""
        named = {} if load_format is None else {"load_format": load_format}
        try:
            answer = self.post("/update_weights_from_disk", model_path=str(model_dir), **named)
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read())
        return bool(answer["success"]), str(answer["message"])
