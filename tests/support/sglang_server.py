"""Starts the real SGLang on CPU, in an environment of its own (make venv-sglang), and asks it for completions.

with SglangServer("0.5.23", model_dir, "--load-format", "b10_3fs") as server:
    text = server.complete("Once upon a time", max_tokens=8)
"""

import os
from collections.abc import Mapping
from pathlib import Path

from tests.support.vllm_server import VllmServer

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).resolve().parent / "sglang" / "probe"
ONE_CORE = "1"
# One core for each rank.
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


def python_of(version: str) -> Path:
    """The Python of the environment that has this version of SGLang."""
    return ROOT / f".venv-sglang-{version}" / "bin" / "python"


class SglangServer(VllmServer):
    """A server of one version of SGLang; its arguments are as VllmServer's.

    Without ``eager`` it compiles, as --enable-torch-compile makes it. Tensor-parallel 2 needs ``env=TWO_RANKS``.
    """

    PROGRAM = "SGLang"
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

    def __init__(self, version: str, model_dir: str | os.PathLike[str], *args: str, **options: object) -> None:
        self.version = version
        super().__init__(model_dir, *args, **options)  # type: ignore[arg-type]

    def _make_command(self, model_dir: str | os.PathLike[str], args: tuple[str, ...], *, eager: bool) -> list[str]:
        command = [str(python_of(self.version)), "-m", "sglang.launch_server", "--model-path", os.fspath(model_dir)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu", "--disable-overlap-schedule"]
        command += ["--max-total-tokens", "4096", "--max-running-requests", "4", "--context-length", "256"]
        if eager:
            command.append("--skip-server-warmup")
        else:
            command.append("--enable-torch-compile")
        return [*command, *args]
