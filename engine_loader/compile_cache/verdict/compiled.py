"""Which files of a cache are compiled code, and which piece of code each belongs to, by their paths alone.

Compilers name their files alike in whatever directory an engine sets, so one table serves all engines; what an engine
keeps under keys of its own stands first. Read in torch 2.13, Triton 3.7, SGLang 0.5.10 to 0.5.23 (its JIT and CuTe
caches), apache-tvm-ffi 0.1.11, vLLM 0.10 to 0.32; FlashInfer, DeepGEMM and TileLang as their documentation has it.
Not judged: what CuTe DSL and Helion keep by themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Compiler:
    """A compiler that keeps its output in files.

    Attributes:
        one, many: its output in words, singular and plural.
        paths: a regular expression for the end of its files' paths in packs. The group ``key`` identifies a piece, the
            group ``name`` is its readable name.
        whole: True where one key stands for a whole model; False where each piece of code has a key.
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
    """A piece of compiled code, kept in one or more files; ``name`` may be empty."""

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
    _VLLM,  # with inductor's and Triton's files: vLLM sets their directories below its own
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
"""A path belongs to the first whose expression matches."""


def piece_of(path: str) -> Piece | None:
    """The piece that the file at ``path`` (as in packs) belongs to; None where it is not compiled code."""
    for compiler in COMPILERS:
        found = compiler.pattern.fullmatch(path)
        if found:
            return Piece(compiler, found["key"], found.groupdict().get("name") or "")
    return None
