"""Shows what it is for, on a tiny random Llama.

vLLM: the real `vllm serve`, one completion; twice, the second time on a fresh machine that has nothing but the compile
cache of the first. Takes about two minutes.
SGLang: the real server with its own loader and with ours: the same completion; then other weights in their place.

make demo                   (or: python -m scripts.demo)
make demo ENGINE=sglang     (or: python -m scripts.demo sglang VERSION)
"""

import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

PROMPT = "Once upon a time"
LOAD_FORMAT = "b10_3fs"
# Progress bars, and lines in which vLLM repeats its arguments and its plugins: they do not say who loaded the weights.
OTHER_LINES = ("% Completed", "server_args=", "non-default args", "load_format=", "Registered model loader", "plugin")


CACHE_DONE = ("compile cache: saved", "compile cache: nothing new to save", "nothing was saved")
CACHE_TIMEOUT_S = 60.0
DONE = {
    "vllm": "vLLM served a model whose weights engine_loader loaded, and compiled it only once.",
    "sglang": "SGLang served a model whose weights engine_loader loaded, as its own loader would have.",
}


@dataclass(frozen=True)
class Served:
    """What a start of the server was like: its answer, all that it printed, and how long it took."""

    text: str
    log: str
    ready_s: float
    init_s: float


@contextmanager
def step(title: str) -> Iterator[None]:
    print(f"• {title} …", flush=True)
    began = time.monotonic()
    yield
    print(f"  done in {time.monotonic() - began:.1f} s", flush=True)


def loader_lines(log: str) -> list[str]:
    """What engine_loader itself said."""
    words = ("engine_loader", LOAD_FORMAT, "compile cache:")
    named = [line for line in log.splitlines() if any(word in line for word in words)]
    return [line for line in named if not any(part in line for part in OTHER_LINES)]


def cache_environment(machine: Path, store: Path) -> dict[str, str | None]:
    """The variables of a machine whose local caches are empty, and of the store that it shares."""
    for name in ("home", "tmp"):
        (machine / name).mkdir(parents=True)
    return {
        "HOME": str(machine / "home"),
        "TMPDIR": str(machine / "tmp"),
        "VLLM_CACHE_ROOT": str(machine / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": None,
        "TRITON_CACHE_DIR": None,
        "ENGINE_LOADER_COMPILE_CACHE__ENABLED": "true",
        "ENGINE_LOADER_COMPILE_CACHE__DIRECTORY": str(store),
    }


def serve(title: str, model_dir: Path, machine: Path, store: Path) -> Served:
    """Start a server on a fresh machine, ask it, wait until its compile cache is saved, stop it."""
    from tests.support.vllm_server import VllmServer

    args = ("--load-format", LOAD_FORMAT, "--served-model-name", model_dir.name)
    server = VllmServer(model_dir, *args, env=cache_environment(machine, store), eager=False)
    with step(title):
        server.start()
    try:
        with step(f"Asking for a completion of {PROMPT!r}"):
            text = server.complete(PROMPT)
            print(f"  {text!r}   (the weights are random, and so is the text)")
        with step("Waiting for the compile cache"):
            deadline = time.monotonic() + CACHE_TIMEOUT_S
            while time.monotonic() < deadline and not any(words in server.log for words in CACHE_DONE):
                time.sleep(0.2)
    finally:
        with step("Stopping the server"):
            server.stop()
    found = re.search(r"init engine .* took ([\d.]+) s", server.log)
    assert server.seconds_to_ready is not None
    return Served(text, server.log, server.seconds_to_ready, float(found[1]) if found else float("nan"))


def run(directory: Path) -> None:
    with step("Making a tiny random Llama"):
        from tests.support.tiny_models import make_model

        model_dir = make_model("llama", directory / "tiny-llama", shards=3)
    store = directory / "store"
    command = f"vllm serve {model_dir.name} --load-format {LOAD_FORMAT}"
    cold = serve(
        f"Starting `{command}` on CPU, cold: it compiles (a minute or more)", model_dir, directory / "1", store
    )
    again = "Starting it on another machine with the compile cache of the first (mostly imports)"
    restored = serve(again, model_dir, directory / "2", store)
    if restored.text != cold.text:
        raise RuntimeError(f"the completions differ: {cold.text!r} and {restored.text!r}")
    if "compile cache: hit" not in restored.log:
        raise RuntimeError(f"the second start did not find everything in the compile cache:\n{restored.log[-6000:]}")
    for name, served in (("cold", cold), ("restored", restored)):
        lines = loader_lines(served.log)
        if not lines:
            raise RuntimeError(f"the server ran, but its log has no line of engine_loader:\n{served.log[-6000:]}")
        print(f"• What engine_loader said, {name}:")
        for line in lines:
            print(f"  {line.strip()}")
    print(f"\n{'':28}{'cold':>10}{'restored':>10}")
    print(f"{'engine initialisation':28}{cold.init_s:8.1f} s{restored.init_s:8.1f} s")
    print(f"{'ready to serve':28}{cold.ready_s:8.1f} s{restored.ready_s:8.1f} s")


def run_sglang(directory: Path, version: str) -> None:
    from tests.support.sglang_server import SglangServer, patched

    with step("Making two tiny random Llamas"):
        from tests.support.tiny_models import make_model

        model_dir = make_model("llama", directory / "tiny-llama", shards=3)
        other_dir = make_model("llama", directory / "other-llama", seed=21)
    texts = {}
    for load_format in ("auto", LOAD_FORMAT):
        with patched(version):
            server = SglangServer(version, model_dir, "--load-format", load_format)
            with step(f"Starting SGLang {version} on CPU with --load-format {load_format} (mostly imports)"):
                server.start()
            try:
                with step(f"Asking for a completion of {PROMPT!r}"):
                    texts[load_format] = server.complete(PROMPT)
                    print(f"  {texts[load_format]!r}   (the weights are random, and so is the text)")
                if load_format == LOAD_FORMAT:
                    with step("Putting other weights in their place (update_weights_from_disk)"):
                        _, message = server.update_weights(other_dir)
                        print(f"  {message}")
            finally:
                with step("Stopping the server"):
                    server.stop()
    if texts["auto"] != texts[LOAD_FORMAT]:
        raise RuntimeError(f"the completions differ: {texts}")
    lines = [line for line in loader_lines(server.log) if "loaded" in line]
    if not lines:
        raise RuntimeError(f"the server ran, but its log has no line of engine_loader:\n{server.log[-6000:]}")
    print("• What engine_loader said:")
    for line in lines:
        print(f"  {line.strip()}")


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    engine = sys.argv[1] if len(sys.argv) > 1 else "vllm"
    signal.signal(signal.SIGTERM, interrupt)  # so that the server is stopped on `kill`, too
    try:
        with tempfile.TemporaryDirectory(prefix="engine-loader-demo-") as directory:
            if engine == "sglang":
                run_sglang(Path(directory), sys.argv[2])
            else:
                run(Path(directory))
    except KeyboardInterrupt:
        print("\nInterrupted; nothing is left running.", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    print("\nIt works: " + DONE[engine])
    return 0


if __name__ == "__main__":
    sys.exit(main())
