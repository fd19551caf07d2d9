"""Measures loads into vLLM's real models on the CPU, and prints Markdown for docs/performance-direct.md.

    python -m benchmarks.direct

Three questions: how fast do 3 GiB reach a Llama's parameters, by this package's two modes, vLLM's own formats, and two
threads of preadv that know where everything goes; what does recording cost per tensor, on a model of 60,000 small
ones; what does a rank of tensor-parallel 4 read, by each choice of the cost model. Rounds are interleaved; figures are
medians. The checkpoints are made once and reused.
"""

import ctypes
import gc
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RUNAI_STREAMER_LOG_LEVEL", "ERROR")

import torch

from benchmarks.arguments import parser_of
from benchmarks.checkpoints import GIB, _write_files, make_checkpoint
from engine_loader.bench import page_cache
from engine_loader.bench.rounds import back_free_memory
from engine_loader.engines.vllm.rank import Rank, RankModel, rank_model
from engine_loader.formats.safetensors import TensorInfo
from engine_loader.loading.direct.load import DirectLoad
from engine_loader.transfer.native import native_readers
from engine_loader.transfer.native.library import Config
from engine_loader.transfer.plan import ExtentRow

PIECE_BYTES = 8 << 20
GAPS = {"tuned": {}, "runs only": {"gap_bytes": 1, "wide_gap_bytes": 1}, "read through": {"gap_bytes": 128 << 10}}
Load = Callable[[RankModel], object]


class Places:
    """Takes down where in the files and in memory every byte of a load is."""

    def __init__(self) -> None:
        self.pieces: list[tuple[str, int, int, int]] = []

    def on_tensor(self, info: TensorInfo) -> None:
        return

    def on_read(self, info: TensorInfo, nbytes: int, why: str) -> None:
        return

    def on_copy(self, info: TensorInfo, extents: Sequence[ExtentRow]) -> None:
        for _, rows, offset, row_bytes, stride, address, step in extents:
            for row in range(rows):
                for begin in range(0, row_bytes, PIECE_BYTES):
                    nbytes = min(PIECE_BYTES, row_bytes - begin)
                    self.pieces.append((info.file, offset + row * stride + begin, address + row * step + begin, nbytes))


def by_loader(load_format: str, **options: Any) -> Load:
    """A load by vLLM's loader for a format."""

    def load(built: RankModel) -> None:
        loader_of(built, load_format, **options).load_weights(built.module, built.config.model_config)

    return load


def loader_of(built: RankModel, load_format: str, **options: Any) -> Any:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    return get_model_loader(
        LoadConfig(load_format=load_format, model_loader_extra_config=options, use_tqdm_on_load=False)
    )


def by_preadv(threads: int) -> Load:
    """Python threads that know every place beforehand: the limit."""
    known: dict[int, list[tuple[str, int, int, int]]] = {}

    def prepare(built: RankModel) -> None:
        places = Places()
        loader = loader_of(built, "b10_3fs", mode="direct")
        loader._load_directly(
            built.module, built.config.model_config, DirectLoad(built.module, observer=places, execute=False)
        )
        known.clear()
        known[id(built.module)] = sorted(places.pieces)

    def load(built: RankModel) -> None:
        pieces = deque(known[id(built.module)])
        files = {path: os.open(path, os.O_RDONLY) for path in {piece[0] for piece in pieces}}

        def work() -> None:
            while pieces:
                try:
                    path, offset, address, nbytes = pieces.popleft()
                except IndexError:
                    return
                memory = memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")
                assert os.preadv(files[path], [memory], offset) == nbytes

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for descriptor in files.values():
            os.close(descriptor)

    load.prepare = prepare  # type: ignore[attr-defined]
    return load


@contextmanager
def model(path: Path, rank: Rank | None = None) -> Iterator[RankModel]:
    with rank_model(path, rank or Rank(), max_model_len=256, skip_tokenizer_init=True, dtype="bfloat16") as built:
        yield built


def seconds_of(load: Load, built: RankModel, *, fresh_bytes: int = 0) -> float:
    gc.collect()
    prepare = getattr(load, "prepare", None)
    if prepare is not None:
        prepare(built)
    if fresh_bytes:
        back_free_memory(fresh_bytes)
    begin = time.perf_counter()
    with torch.no_grad():
        load(built)
    return time.perf_counter() - begin


def measure_llama(path: Path, rounds: int) -> None:
    loads: dict[str, Load] = {
        "b10_3fs, direct": by_loader("b10_3fs", mode="direct"),
        "b10_3fs, stream": by_loader("b10_3fs", mode="stream"),
        "vLLM's default": by_loader("auto"),
        "runai_streamer": by_loader("runai_streamer"),
        "2 threads of preadv": by_preadv(2),
    }
    nbytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    touched: dict[str, list[float]] = {name: [] for name in loads}
    fresh: dict[str, list[float]] = {name: [] for name in loads}
    with model(path) as built:
        for parameter in built.module.parameters():
            parameter.data.fill_(0)
        for _ in range(rounds):
            for name, load in loads.items():
                touched[name].append(seconds_of(load, built))
    del built
    for _ in range(max(3, rounds // 2)):
        for name, load in loads.items():
            give_memory_back()
            with model(path) as built:
                fresh[name].append(seconds_of(load, built, fresh_bytes=nbytes))
            del built
    rows = []
    for name in loads:
        one, other = median(touched[name]), median(fresh[name])
        limit = median(touched["2 threads of preadv"])
        default = median(fresh["vLLM's default"])
        rows.append((name, rate(nbytes, one), f"{limit / one:.2f}", rate(nbytes, other), f"{default / other:.2f}"))
    columns = ("load", "touched, GB/s", "of preadv", "fresh, GB/s", "times vLLM's default")
    table(f"A Llama of {nbytes / GIB:.2f} GiB, from the page cache, medians of {rounds} rounds", columns, rows)


def measure_many_tensors(path: Path, rounds: int) -> None:
    def recording_only(built: RankModel) -> None:
        loader = loader_of(built, "b10_3fs", mode="direct")
        loader._load_directly(built.module, built.config.model_config, DirectLoad(built.module, execute=False))

    with model(path) as built:
        infos = list(in_memory(path))

        def engine_only(built: RankModel) -> None:
            load_weights: Any = built.module.load_weights
            load_weights(iter(infos))

        loads: dict[str, Load] = {
            "the engine's own code, tensors in memory": engine_only,
            "b10_3fs, recording only": recording_only,
            "b10_3fs, direct": by_loader("b10_3fs", mode="direct"),
            "b10_3fs, stream": by_loader("b10_3fs", mode="stream"),
            "vLLM's default": by_loader("auto"),
        }
        for parameter in built.module.parameters():
            parameter.data.fill_(0)
        times: dict[str, list[float]] = {name: [] for name in loads}
        for _ in range(rounds):
            for name, load in loads.items():
                times[name].append(seconds_of(load, built))
    engine = median(times["the engine's own code, tensors in memory"])
    rows = []
    for name, found in times.items():
        each = median(found) / len(infos) * 1e6
        rows.append((name, f"{median(found):.2f}", f"{each:.1f}", f"{each - engine / len(infos) * 1e6:.1f}"))
    columns = ("load", "s", "µs a tensor", "of it beyond the engine's own code")
    table(f"{len(infos):,} tensors of 4 KiB, a mixture of experts, medians of {rounds} rounds", columns, rows)


def tuned(config: Any, limits: dict[str, int]) -> Any:
    """The configuration of native reader threads, with limits of its own."""

    class Tuned(config):  # type: ignore[misc]
        def __init__(self, **fields: Any) -> None:
            super().__init__(**{**fields, **limits})

    return Tuned


def in_memory(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors.torch import load_file

    for file in sorted(path.glob("*.safetensors")):
        yield from load_file(file).items()


def measure_cost_model(path: Path, rounds: int) -> None:
    rows = []
    files = [str(file) for file in path.glob("*.safetensors")]
    with model(path, Rank(4, rank=1)) as built:
        for mode in ("buffered", "direct"):
            for name, limits in GAPS.items():
                times, read, kept = [], 0, 0
                with mock.patch.object(native_readers, "Config", tuned(Config, limits)):
                    for _ in range(rounds):
                        if mode == "direct":
                            page_cache.drop(files)
                        loader = loader_of(built, "b10_3fs", mode="direct", read_mode=mode)
                        begin = time.perf_counter()
                        with torch.no_grad():
                            loader.load_weights(built.module, built.config.model_config)
                        times.append(time.perf_counter() - begin)
                        (report,) = loader.last_load.reports
                        read, kept = report.bytes_read, report.bytes_loaded
                rows.append(
                    (
                        mode,
                        name,
                        f"{kept / GIB:.2f}",
                        f"{read / GIB:.2f}",
                        f"{median(times):.2f}",
                        rate(kept, median(times)),
                    )
                )
        page_cache.warm(files)
        times = [seconds_of(by_loader("auto"), built) for _ in range(rounds)]
        rows.append(
            ("-", "vLLM's default", f"{kept / GIB:.2f}", "-", f"{median(times):.2f}", rate(kept, median(times)))
        )
    columns = ("read", "inner dimensions", "kept, GiB", "read, GiB", "s", "kept, GB/s")
    table(f"Rank 1 of tensor-parallel 4 of the same Llama, medians of {rounds} rounds", columns, rows)


def make_many_tensors(directory: Path) -> Path:
    """A Qwen3-MoE of 10 layers of 2,000 tiny experts."""
    layers, experts, hidden, inner, heads, size = 10, 2000, 64, 32, 2, 32
    directory.mkdir(parents=True, exist_ok=True)
    tensors: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (512, hidden))]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors += [(f"{prefix}.{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention")]
        tensors += [(f"{prefix}.self_attn.{name}_proj.weight", (heads * size, hidden)) for name in "qkv"]
        tensors += [(f"{prefix}.self_attn.{name}_norm.weight", (size,)) for name in "qk"]
        tensors += [
            (f"{prefix}.self_attn.o_proj.weight", (hidden, heads * size)),
            (f"{prefix}.mlp.gate.weight", (experts, hidden)),
        ]
        for expert in range(experts):
            name = f"{prefix}.mlp.experts.{expert}"
            tensors += [(f"{name}.{kind}_proj.weight", (inner, hidden)) for kind in ("gate", "up")]
            tensors.append((f"{name}.down_proj.weight", (hidden, inner)))
    tensors += [("model.norm.weight", (hidden,)), ("lm_head.weight", (512, hidden))]
    _write_files(directory, tensors, 4)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "moe_intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": size,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory


def give_memory_back() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def rate(nbytes: int, seconds: float) -> str:
    return f"{nbytes / seconds / 1e9:.2f}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}:\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


def main() -> None:
    parser = parser_of(__doc__, "engine-loader-benchmark-direct")
    parser.add_argument("--gib", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["llama", "many", "cost"], nargs="*", default=["llama", "many", "cost"])
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    llama, many = arguments.dir / f"llama-{arguments.gib:g}", arguments.dir / "many"
    if not (llama / "config.json").exists():
        make_checkpoint(llama, int(arguments.gib * GIB), 6)
    if not (many / "config.json").exists():
        make_many_tensors(many)
    page_cache.warm([str(file) for file in llama.glob("*.safetensors")])
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} before, torch with {torch.get_num_threads()} threads.")
    if "llama" in arguments.only:
        measure_llama(llama, arguments.rounds)
    if "cost" in arguments.only:
        measure_cost_model(llama, max(3, arguments.rounds // 2))
    if "many" in arguments.only:
        measure_many_tensors(many, max(3, arguments.rounds // 2))
    print(f"\nLoad {os.getloadavg()[0]:.1f} after.")


if __name__ == "__main__":
    main()
