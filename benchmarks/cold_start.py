"""From exec to ready of `vllm serve` on CPU, with a cold checkpoint behind a given bandwidth, interleaved.

    python -m benchmarks.cold_start --gib 3 --rounds 2 --ways off,auto
    python -m benchmarks.cold_start --gib 3 --rounds 2 --ways off,auto,command --source s3    (or usrbio)

Eager starts, each with the same answer to the same prompt. Ways: off and auto of `start.warm`; `command`: auto with
`engine-loader warm` begun together with the engine; `template`: auto with start.template: auto; `both`: these two;
`prefetch`: vLLM's own loader with --safetensors-load-strategy prefetch; `resident`: auto with a checkpoint that lies in
the page cache. The disk is throttled for this process and its children by a cgroup of version 1 (blkio) that only root
can make; what the engine imports lies in the page cache, but for what the kernel has dropped. The bound is max(what
comes before the load where nothing is read, transfer) plus what comes behind it, from the start with a resident
checkpoint. With --source, the checkpoint lies on 3FS (the emulator) or on S3 on loopback instead, over a link of that
bandwidth, and `resident` reads it from the local disk. Needs vLLM's CPU build.
"""

import mmap
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arguments import parser_of
from benchmarks.node import place
from engine_loader.bench.page_cache import drop, resident_share, warm
from engine_loader.report import phases
from engine_loader.report.reading.timeline import read_timeline
from engine_loader.report.starts import starts_in
from tests.support.tiny_models import make_model
from tests.support.vllm_server import VllmServer

WAYS = ("off", "auto", "command", "template", "both", "prefetch", "resident")
PROMPT = "the quick brown fox"
BLKIO = Path("/sys/fs/cgroup/blkio")
LAYER_BYTES = 134_230_016
"""Of the model below, in bfloat16."""
SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 16}


@contextmanager
def disk_of(path: Path, bytes_per_s: int) -> Iterator[None]:
    """While the block runs, this process and its children read that many bytes a second from the disk of ``path``."""
    group = BLKIO / f"cold-start-{os.getpid()}"
    device = os.stat(path).st_dev
    group.mkdir()
    try:
        (group / "blkio.throttle.read_bps_device").write_text(f"{os.major(device)}:{os.minor(device)} {bytes_per_s}")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (BLKIO / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


@dataclass(frozen=True)
class Start:
    """Seconds from exec to ready, to the beginning of the load, and to its end; the answer; what start.warm said."""

    ready: float
    began: float
    ended: float
    answer: str
    said: str


@contextmanager
def behind_a_link(source: str, model: Path, bytes_per_s: int) -> Iterator[Mapping[str, str]]:
    """The variables by which an engine reads the checkpoint from that source while the block runs."""
    if source == "disk":
        with disk_of(model, bytes_per_s) if bytes_per_s else nullcontext():
            yield {}
        return
    with tempfile.TemporaryDirectory() as scratch, place(source, model, Path(scratch), bytes_per_s) as where:
        settings = where.settings | ({"weights_uri": f"s3://{model.name}"} if source == "s3" else {})
        yield {
            **where.environment,
            **{f"ENGINE_LOADER_LOADER__{name.upper()}": str(value) for name, value in settings.items()},
        }


def touch_memory(nbytes: int) -> None:
    """Take so much memory and give it back: what a virtual machine has not used for a while, its host may have taken
    away, and the first to touch it would pay for that."""
    with mmap.mmap(-1, nbytes) as memory:
        for offset in range(0, nbytes, mmap.PAGESIZE):
            memory[offset] = 1


def start(model: Path, way: str, environment: Mapping[str, str]) -> Start:
    """Start vLLM once."""
    touch_memory(3 * sum(path.stat().st_size for path in model.glob("*.safetensors")))
    if way == "resident":
        environment = {}
    files = [str(path) for path in model.glob("*.safetensors")]
    if not environment:
        drop(files)
    if way == "resident":
        warm(files)
    if not environment and (resident_share(files) > 0.5) is not (way == "resident"):
        raise RuntimeError("the page cache does not hold what it should")
    with tempfile.TemporaryDirectory() as directory:
        env = {
            **environment,
            "ENGINE_LOADER_START__WARM": "off" if way in ("off", "prefetch") else "auto",
            "ENGINE_LOADER_START__TEMPLATE": "auto" if way in ("template", "both") else "off",
            "ENGINE_LOADER_REPORT__DIRECTORY": directory,
            "VLLM_CPU_OMP_THREADS_BIND": "0",
        }
        options = ["--load-format", "b10_3fs"]
        if way == "prefetch":
            options = ["--load-format", "safetensors", "--safetensors-load-strategy", "prefetch"]
        command = [str(Path(sys.executable).with_name("engine-loader")), "warm", str(model)]
        with (
            subprocess.Popen(command, env={**os.environ, **env}) if way in ("command", "both") else nullcontext(),
            VllmServer(model, *options, env=env, start_timeout_s=900) as server,
        ):
            assert server.seconds_to_ready is not None
            text = server.complete(PROMPT, max_tokens=8)
            line = next((line for line in server.log.splitlines() if "start.warm" in line), "")
        (recorded,) = starts_in(directory)
        timeline = read_timeline(recorded)
        (found,) = timeline.phases(phases.WEIGHTS)
        said = line.partition("start.warm")[2]
        return Start(server.seconds_to_ready, found[1].began, timeline.end_of(*found), text, said)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="interleaved rounds")
    parser.add_argument("--gib", type=float, default=3.0, help="size of the checkpoint")
    parser.add_argument("--mb-per-s", type=float, default=200.0, help="of the disk or the link; 0: as it is")
    parser.add_argument("--source", choices=("disk", "usrbio", "s3"), default="disk", help="default: %(default)s")
    parser.add_argument("--ways", default=",".join(WAYS), help="which, by commas (default: %(default)s)")
    arguments = parser.parse_args()
    layers = round(arguments.gib * (1 << 30) / LAYER_BYTES)
    model = arguments.dir / f"cold-{layers}"
    if not (model / "tokenizer.json").exists():
        make_model("llama", model, shards=4, num_hidden_layers=layers, **SIZES)
    nbytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    found: dict[str, list[Start]] = {way: [] for way in arguments.ways.split(",")}
    with behind_a_link(arguments.source, model, int(arguments.mb_per_s * 1e6)) as environment:
        for number in range(arguments.rounds):
            for way, starts in found.items():
                one = start(model, way, environment)
                starts.append(one)
                said = (
                    f"load from {one.began:.1f} to {one.ended:.1f} s, load average {os.getloadavg()[0]:.1f}{one.said}"
                )
                print(f"round {number + 1}, {way}: ready in {one.ready:.1f} s, {said}", file=sys.stderr, flush=True)
    print(f"{nbytes / 1e9:.2f} GB, {arguments.source}, at {arguments.mb_per_s:g} MB/s")
    print("| way | median s | fastest - slowest | load begins at s | load takes s |\n|---|---:|---:|---:|---:|")
    for way, starts in found.items():
        ready = [one.ready for one in starts]
        begins = statistics.median(one.began for one in starts)
        takes = statistics.median(one.ended - one.began for one in starts)
        spread = f"{min(ready):.1f} - {max(ready):.1f}"
        print(f"| {way} | {statistics.median(ready):.1f} | {spread} | {begins:.1f} | {takes:.1f} |")
    if found.get("resident") and arguments.mb_per_s:
        begins = statistics.median(one.began for one in found["resident"])
        rest = statistics.median(one.ready - one.began for one in found["resident"])
        print(f"bound: {max(begins, nbytes / 1e6 / arguments.mb_per_s) + rest:.1f} s")
    answers = {one.answer for starts in found.values() for one in starts}
    print(f"answers: {'all equal' if len(answers) == 1 else 'DIFFERENT'}")
    return 0 if len(answers) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
