"""Which files of a cache are compiled code, and which piece of it each belongs to: told by their paths alone.

What compilers keep looks alike wherever an engine has them keep it, so one table serves all engines; what an engine
keeps under keys of its own stands before it. Read in torch 2.13, Triton 3.7, SGLang 0.5.10 to 0.5.23 (its JIT and CuTe
caches), apache-tvm-ffi 0.1.11, vLLM 0.10 to 0.32; FlashInfer, DeepGEMM and TileLang as their documentation has it.
Not judged: what CuTe DSL and Helion keep by themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Compiler:
    """Something that compiles, and keeps what it made.

    Attributes:
        one, many: what it makes, for a person.
        paths: an expression for the paths of its files in packs, from where it says something. Its group ``key`` tells
            one piece from another, ``name`` is what a person knows it by.
        whole: an engine uses one key at a time, which stands for the model. Else each piece has one.
    """

    one: str
    many: str
    paths: str
    whole: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(rf"(?:.*?/)??{self.paths}", re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """What one or more files of a cache are parts of; ``name`` may be empty."""

    compiler: Compiler
    key: str
    name: str


_VLLM = Compiler(
    "model of vLLM",
    "models of vLLM",
    r"vllm/(?P<key>torch_compile_cache/(?:torch_aot_compile/)?[^/]+|torch_aot_compile/[^/]+)/.+",
    whole=True,
)
COMPILERS = (
    _VLLM,  # also inductor's and Triton's, for vLLM has them keep theirs there
    Compiler("graph of inductor", "graphs of inductor", r"fxgraph/[^/]+/(?P<key>[^/]+)/[^/]+"),
    Compiler("C++ kernel of inductor", "C++ kernels of inductor", r"[^/]{2}/(?P<key>c[a-z2-7]{40,})(?:\.main)?\.so"),
    Compiler(
        "Triton kernel",
        "Triton kernels",
        r"(?P<key>[A-Z2-7]{52})/(?P<name>[^/.]+)\.(?:[^/]*\.)?(?:cubin|hsaco|spv|so)",
    ),
    Compiler(
        "JIT kernel of SGLang", "JIT kernels of SGLang", r"(?P<name>[^/]+)/(?P<key>build-[^/]+/deps-[^/]+)/[^/]+\.so"
    ),
    Compiler("FlashInfer kernel", "FlashInfer kernels", r"(?P<key>[^/]+/cached_ops/(?P<name>[^/]+))/[^/]+\.so"),
    Compiler(
        "DeepGEMM kernel", "DeepGEMM kernels", r"kernel\.(?P<name>[^/]+)\.(?P<key>[0-9a-f]{16,})/kernel\.(?:cubin|so)"
    ),
    Compiler("TVM-FFI module", "TVM-FFI modules", r"(?P<name>[^/]+)_(?P<key>[0-9a-f]{16,})/(?P=name)\.so"),
    Compiler("TileLang kernel", "TileLang kernels", r"(?P<key>[0-9a-f]{64})/[^/]+\.(?:so|cubin)"),
    Compiler("CuTe kernel", "CuTe kernels", r"(?P<key>[0-9a-f]{64})\.o"),
    Compiler("kernel of CUDA's driver", "kernels of CUDA's driver", r"[0-9a-f]/[0-9a-f]/(?P<key>[0-9a-f]{14,})"),
    Compiler("other library", "other libraries", r"(?P<key>.+)\.so"),
)
"""The first that knows a path has it."""


def piece_of(path: str) -> Piece | None:
    """What the file at ``path`` (as in packs) is a part of; None where it is no compiled code."""
    for compiler in COMPILERS:
        found = compiler.pattern.fullmatch(path)
        if found:
            return Piece(compiler, found["key"], found.groupdict().get("name") or "")
    return None
