"""Writes big synthetic bf16 checkpoints quickly, shaped like a Llama, for measuring loaders.

python -m benchmarks.checkpoints DIR --gib 3 --files 6
"""

import argparse
import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

GIB = 1 << 30
BF16_BYTES = 2
HEAD_DIM = 64
NOISE_BYTES = 64 << 20
EQUAL_TENSOR_BYTES = 16 << 20
WANTED_LAYERS = 16  # at least: real checkpoints are deep, and a loader's work is per tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama that vLLM and transformers accept."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_DIM

    @property
    def kv_heads(self) -> int:
        return max(1, self.heads // 4)

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        hidden, kv = self.hidden, self.kv_heads * HEAD_DIM
        yield "model.embed_tokens.weight", (self.vocab, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (hidden,)
            yield f"{prefix}.mlp.down_proj.weight", (hidden, self.intermediate)
            yield f"{prefix}.mlp.gate_proj.weight", (self.intermediate, hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.intermediate, hidden)
            yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
            yield f"{prefix}.self_attn.k_proj.weight", (kv, hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
            yield f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (kv, hidden)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocab, hidden)

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": HEAD_DIM,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }


def llama_of(total_bytes: int) -> LlamaShape:
    """The widest Llama of at least WANTED_LAYERS layers that fits into `total_bytes`, and nearly fills them."""
    for hidden in (8192, 4096, 2048, 1024, 512, 256, 128):
        vocab = 32_000 if hidden >= 1024 else 4096
        layer = _bytes_of(LlamaShape(hidden, _intermediate(hidden), 1, vocab)) - _bytes_of(
            LlamaShape(hidden, _intermediate(hidden), 0, vocab)
        )
        layers = (total_bytes - _bytes_of(LlamaShape(hidden, 0, 0, vocab))) // layer
        if layers >= WANTED_LAYERS:
            return _fill(LlamaShape(hidden, _intermediate(hidden), int(layers), vocab), total_bytes)
    raise ValueError(f"{total_bytes} bytes are too few for a Llama of {WANTED_LAYERS} layers")


def _intermediate(hidden: int) -> int:
    return hidden * 11 // 4


def _fill(shape: LlamaShape, total_bytes: int) -> LlamaShape:
    """Widens the MLPs by what is left over, in steps that suit matrix kernels."""
    left = total_bytes - _bytes_of(shape)
    widening = left // (3 * shape.hidden * shape.layers * BF16_BYTES) // 64 * 64
    return LlamaShape(shape.hidden, shape.intermediate + widening, shape.layers, shape.vocab)


def _bytes_of(shape: LlamaShape) -> int:
    return sum(_nbytes(tensor) for _, tensor in shape.tensors())


def _nbytes(shape: Shape) -> int:
    return BF16_BYTES * torch.Size(shape).numel()


def make_checkpoint(
    directory: str | os.PathLike[str], total_bytes: int, files: int = 1, *, tensors_like_llama: bool = True
) -> Path:
    """Writes about `total_bytes` (never more) into exactly `files` safetensors files, with an index for several.

    With `tensors_like_llama` there is also a config.json, and vLLM loads the directory; without, all tensors are alike
    in size. The values are noise of which no two tensors begin at the same place.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if tensors_like_llama:
        shape = llama_of(total_bytes)
        (directory / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")
        tensors = list(shape.tensors())
    else:
        count = max(files, total_bytes // EQUAL_TENSOR_BYTES)
        side = (total_bytes // count // BF16_BYTES // 256, 256)
        tensors = [(f"tensor.{number:05}", side) for number in range(count)]
    _write_files(directory, tensors, files)
    return directory


def kept_checkpoint(directory: Path, gib: float, files: int) -> Path:
    """The checkpoint of an earlier run in ``directory``, or a new one, which gets its name when it is complete."""
    path = directory / f"llama-{gib:g}gib-{files}files"
    if not path.exists():
        unfinished = path.with_suffix(".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        make_checkpoint(unfinished, int(gib * GIB), files)
        unfinished.rename(path)
    return path


def _write_files(directory: Path, tensors: list[tuple[str, Shape]], files: int) -> None:
    noise = _noise()
    weight_map: dict[str, str] = {}
    for number, part in enumerate(_split_evenly(tensors, files), start=1):
        name = "model.safetensors" if files == 1 else f"model-{number:05}-of-{files:05}.safetensors"
        _write_safetensors(directory / name, part, noise, first=len(weight_map))
        weight_map |= dict.fromkeys((tensor for tensor, _ in part), name)
    if files > 1:
        index = {
            "metadata": {"total_size": sum(_nbytes(shape) for _, shape in tensors)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _noise() -> memoryview:
    generator = torch.Generator().manual_seed(20)
    values = torch.randn(NOISE_BYTES // 4, generator=generator).mul_(0.02).to(torch.bfloat16)
    twice = torch.cat([values, values])  # so that a tensor can start anywhere in the first half
    return memoryview(twice.view(torch.uint8).numpy().data)


def _split_evenly(tensors: list[tuple[str, Shape]], parts: int) -> Iterator[list[tuple[str, Shape]]]:
    """Runs of neighbours of about the same size, none of them empty."""
    if not 1 <= parts <= len(tensors):
        raise ValueError(f"{len(tensors)} tensors cannot be split into {parts} files")
    ends = [0]
    for _, shape in tensors:
        ends.append(ends[-1] + _nbytes(shape))
    cuts = [0]
    for part in range(1, parts):
        wanted = ends[-1] * part / parts
        nearest = min(range(len(ends)), key=lambda cut: abs(ends[cut] - wanted))
        cuts.append(min(max(nearest, cuts[-1] + 1), len(tensors) - (parts - part)))
    for start, end in pairwise([*cuts, len(tensors)]):
        yield sorted(tensors[start:end])  # safetensors writes tensors of one dtype by name


def _write_safetensors(path: Path, tensors: list[tuple[str, Shape]], noise: memoryview, first: int) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + _nbytes(shape)]}
        end += _nbytes(shape)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        os.posix_fallocate(file.fileno(), 0, file.tell() + end)  # so that a full disk shows now
        for number, (_, shape) in enumerate(tensors, start=first):
            _write_noise(file.fileno(), noise, start=number * 4099 * BF16_BYTES, nbytes=_nbytes(shape))


def _write_noise(fd: int, noise: memoryview, *, start: int, nbytes: int) -> None:
    half = len(noise) // 2
    while nbytes > 0:
        begin = start % half
        written = os.write(fd, noise[begin : begin + min(nbytes, half)])
        start, nbytes = start + written, nbytes - written


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a synthetic bf16 checkpoint.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--equal", action="store_true", help="tensors of one size, not those of a Llama")
    arguments = parser.parse_args()
    path = make_checkpoint(
        arguments.directory, int(arguments.gib * GIB), arguments.files, tensors_like_llama=not arguments.equal
    )
    total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    print(f"{path}: {total / GIB:.2f} GiB")


if __name__ == "__main__":
    main()
