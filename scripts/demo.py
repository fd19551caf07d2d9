"""Shows that the load format works: a tiny random Llama, the real `vllm serve`, one completion. Takes about a minute.

make demo        (or: python -m scripts.demo)
"""

import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PROMPT = "Once upon a time"
LOAD_FORMAT = "b10_3fs"
# Progress bars, and lines in which vLLM repeats its arguments and its plugins: they do not say who loaded the weights.
OTHER_LINES = ("% Completed", "non-default args", "load_format=", "Registered model loader", "plugin")


@contextmanager
def step(title: str) -> Iterator[None]:
    print(f"• {title} …", flush=True)
    began = time.monotonic()
    yield
    print(f"  done in {time.monotonic() - began:.1f} s", flush=True)


def loader_lines(log: str) -> list[str]:
    """What engine_loader itself said."""
    named = [line for line in log.splitlines() if "engine_loader" in line or LOAD_FORMAT in line]
    return [line for line in named if not any(part in line for part in OTHER_LINES)]


def run(directory: Path) -> None:
    with step("Making a tiny random Llama"):
        from tests.support.tiny_models import make_model

        model_dir = make_model("llama", directory / "tiny-llama", shards=3)
    from tests.support.vllm_server import VllmServer

    command = f"vllm serve {model_dir.name} --load-format {LOAD_FORMAT}"
    server = VllmServer(model_dir, "--load-format", LOAD_FORMAT, "--served-model-name", model_dir.name)
    with step(f"Starting `{command}` on CPU (half a minute or more: mostly imports)"):
        server.start()
    try:
        with step(f"Asking for a completion of {PROMPT!r}"):
            print(f"  {server.complete(PROMPT)!r}   (the weights are random, and so is the text)")
    finally:
        with step("Stopping the server"):
            server.stop()
    lines = loader_lines(server.log)
    if not lines:
        raise RuntimeError(f"the server ran, but its log has no line of engine_loader:\n{server.log_tail()}")
    print("• What the loader said:")
    for line in lines:
        print(f"  {line.strip()}")


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    signal.signal(signal.SIGTERM, interrupt)  # so that the server is stopped on `kill`, too
    try:
        with tempfile.TemporaryDirectory(prefix="engine-loader-demo-") as directory:
            run(Path(directory))
    except KeyboardInterrupt:
        print("\nInterrupted; nothing is left running.", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    print(f"\nIt works: vLLM served a model whose weights engine_loader loaded (--load-format {LOAD_FORMAT}).")
    return 0


if __name__ == "__main__":
    sys.exit(main())
