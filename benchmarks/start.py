"""From exec to ready of restored starts of `vllm serve` on CPU, with `start.template` off and auto, interleaved.

    python -m benchmarks.start --rounds 3

Two starts fill a compile cache (the first one that restores still adds to it); then each round restores it once in each
way, into local caches that are empty, and asks for the same 24 tokens. Figures are medians; the ratio is that of the
medians. With --eager nothing is compiled nor restored, and vLLM's own cache (~/.cache/vllm) is used. Needs vLLM's CPU
build.

    python -m benchmarks.start --sglang 0.5.23

Eager starts of SGLang, `start.template` off and on, in the environment that `make venv-sglang` has made.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.arguments import parser_of
from tests.support.sglang_server import TWO_RANKS, SglangServer
from tests.support.tiny_models import make_model
from tests.support.vllm_server import VllmServer

PROMPT = "the quick brown fox"
SAVED = ("compile cache: saved", "compile cache: nothing new to save")
SAVE_TIMEOUT_S = 600


def start(model: Path, scratch: Path, way: str, ranks: int, *, eager: bool, save: bool = False) -> tuple[float, str]:
    """Seconds from exec to ready, and what it answers; with ``save`` it goes on until its cache is saved."""
    with tempfile.TemporaryDirectory(dir=scratch) as local:
        env = {
            "ENGINE_LOADER_COMPILE_CACHE__ENABLED": str(not eager).lower(),
            "ENGINE_LOADER_COMPILE_CACHE__DIRECTORY": str(scratch / "store"),
            "ENGINE_LOADER_START__TEMPLATE": way,
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(rank % (os.cpu_count() or 1)) for rank in range(ranks)),
        }
        if not eager:
            env |= {"VLLM_CACHE_ROOT": f"{local}/vllm", "TORCHINDUCTOR_CACHE_DIR": f"{local}/inductor"}
        options = ["--load-format", "b10_3fs", "--tensor-parallel-size", str(ranks)]
        with VllmServer(model, *options, env=env, eager=eager, start_timeout_s=900) as server:
            text = server.complete(PROMPT, max_tokens=24)
            deadline = time.monotonic() + SAVE_TIMEOUT_S
            while save and not any(line in server.log for line in SAVED) and time.monotonic() < deadline:
                time.sleep(1)
            assert server.seconds_to_ready is not None
            return server.seconds_to_ready, text


def start_sglang(version: str, model: Path, way: str, ranks: int) -> tuple[float, str]:
    """As ``start``, of SGLang."""
    env = {"ENGINE_LOADER_START__TEMPLATE": way, **(TWO_RANKS if ranks == 2 else {})}
    with SglangServer(version, model, "--load-format", "b10_3fs", "--tp-size", str(ranks), env=env) as server:
        assert server.seconds_to_ready is not None
        return server.seconds_to_ready, server.complete(PROMPT, max_tokens=24)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--eager", action="store_true", help="nothing is compiled, nor restored")
    parser.add_argument("--sglang", metavar="VERSION", help="eager starts of this version of SGLang")
    arguments = parser.parse_args()
    ways = ("off", "on" if arguments.sglang else "auto")
    with tempfile.TemporaryDirectory(prefix="benchmark-start-") as directory:
        scratch = Path(directory)
        model = make_model("llama", scratch / "model", shards=3)
        if not arguments.eager and not arguments.sglang:
            for _ in range(2):
                start(model, scratch, "off", arguments.ranks, eager=False, save=True)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        answers = set()
        for number in range(arguments.rounds):
            for way in ways:
                if arguments.sglang:
                    taken, text = start_sglang(arguments.sglang, model, way, arguments.ranks)
                else:
                    taken, text = start(model, scratch, way, arguments.ranks, eager=arguments.eager)
                seconds[way].append(taken)
                answers.add(text)
                load = os.getloadavg()[0]
                print(f"round {number + 1}, {way}: {taken:.1f} s (load {load:.1f})", file=sys.stderr, flush=True)
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    print("| start.template | median s | fastest - slowest | of off |\n|---|---:|---:|---:|")
    for way in ways:
        print(
            f"| {way} | {medians[way]:.1f} | {min(seconds[way]):.1f} - {max(seconds[way]):.1f} "
            f"| {medians[way] / medians['off']:.2f} |"
        )
    print(f"answers: {'all equal' if len(answers) == 1 else 'DIFFERENT'}")
    return 0 if len(answers) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
