"""Which paths in a local cache compilers make. What lies there besides is nobody's cache, and is never packed: a
variable that names a cache may name a home directory.

Read in torch 2.13, Triton 3.9, vLLM 0.32 and 0.33 (the same) and apache-tvm-ffi 0.1.15; in SGLang 0.5.23 as far as the
variables and defaults of its directories go; the rest as their documentation has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Names that hold a digest, as compilers give them: hexadecimal, or base32 in small or capital letters.
_DIGEST = r"[^/]*(?:[0-9a-f]{14,}|[a-z2-7]{40,}|[A-Z2-7]{52})[^/]*"
_BINARY = r"so|o|a|cubin|fatbin|ptx|hsaco|spv|amdgcn|llir|ttir|ttgir|gch"
_TEXT = r"json|py|c|cc|cpp|cu|h|hpp|cuh|inc|d|ninja|txt|bin|pkl|mlir|source|best_config"
_TRITON = r"(?:[A-Z2-7]{52}|[0-9a-f]{64})/[^/]+"
# Directories that only compilers make, whatever lies below them.
_OWN = (
    r"torch_compile_cache|torch_aot_compile|fxgraph|aotautograd|aoti_eager|cached_ops|generated|build-[^/]+|"
    r"deps-[^/]+|py3\d+_(?:cpu|cu\d+|rocm[^/]*)"
)
ANY_COMPILER = (
    rf"(?:[^/]+/)*(?:{_OWN})/.+",
    rf"(?:[^/]+/)+[^/]+\.(?:{_BINARY})",
    rf"(?:[^/]+/)*{_DIGEST}/(?:[^/]+/)*[^/]+\.(?:{_TEXT})",
    rf"(?:[^/]+/)*{_DIGEST}",
)
"""Compiled code in a directory, and what lies by it under a name with a digest."""
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "inductor": (
        rf"[a-z2-7]{{2}}/[^/]+\.(?:{_BINARY})",
        rf"[a-z2-7]{{2}}/{_DIGEST}(?:/.+)?",
        r"(?:fxgraph|aotautograd|aoti_eager)/.+",
        rf"triton/\d+/{_TRITON}",
        r"precompiled_headers/[^/]+\.h(?:\.gch)?",
        r"cache/[0-9a-f]{64}",
        r"dynamo/(?:[^/]+/)*code_state_[^/]+",
        r"[0-9a-f]{64}(?:\.best_config)?",
    ),
    "triton": (_TRITON,),
    "vllm": (
        r"(?:torch_compile_cache|torch_aot_compile)/.+",
        r"(?:flashinfer_autotune_cache|rocm_segmented_attention|startup_plan|modelinfos)/(?:[^/]+/)*[^/]+\.json",
        rf"rocm_segmented_attention/triton/{_TRITON}",
        r"deep_gemm/(?:cache/)?kernel\.[^/]+/[^/]+",
    ),
    "flashinfer_autotune": (r"(?:[^/]+/)*autotune_configs[^/]*\.json",),
    "flashinfer": (*ANY_COMPILER, r"(?:[^/]+/)+autotune[^/]*\.json"),
    "deep_gemm": (r"(?:cache/)?kernel\.[^/]+/[^/]+",),
    "tvm_ffi": (rf"{_DIGEST}/[^/]+",),
    "cute_dsl": ANY_COMPILER,
    "tilelang": (rf"(?:[^/]+/)*{_DIGEST}/[^/]+",),
    "helion": ANY_COMPILER,
    "cuda": (r"[0-9a-f]/[0-9a-f]/[0-9a-f]{14,}", r"index"),
    "sglang": (*ANY_COMPILER, r"(?:[^/]+/)+autotune[^/]*\.json", r"flashinfer/autotune/(?:[^/]+/)*rank_[^/]*\.json"),
    "sglang_jit": ANY_COMPILER,
    "sglang_cute": ANY_COMPILER,
    "humming": ANY_COMPILER,
    "b12x": ANY_COMPILER,
    "minfer_fmha": ANY_COMPILER,
    "minfer_sparse": ANY_COMPILER,
    "flash_attention": ANY_COMPILER,
    "quack": ANY_COMPILER,
    "flydsl": ANY_COMPILER,
    "torch_extensions": (r"(?:py3\d+_[^/]+/)?[^/]+/(?:build\.ninja|\.ninja_(?:log|deps)|[^/]+\.(?:so|o|cpp|cu|d))",),
}
"""Name of a cache -> what its compiler makes there: regular expressions for whole paths, relative to its directory.
A cache without a row is taken as ``ANY_COMPILER`` has it.
"""
_FLASHINFER_IN_SGLANG = ".cache/flashinfer/"
_HIDDEN = re.compile(r"(?:.*/)?\.(?!ninja_(?:log|deps)$).*", re.DOTALL)
_compiled: dict[tuple[str, ...], re.Pattern[str]] = {}


def made_by_compiler(cache: str, path: str) -> bool:
    """Whether the compiler of ``cache`` makes files at ``path`` (relative to the cache's directory). Nothing hidden
    is, but for what ninja keeps.
    """
    if cache == "sglang":
        path = path.removeprefix(_FLASHINFER_IN_SGLANG)
    return _HIDDEN.fullmatch(path) is None and _pattern(LAYOUTS.get(cache, ANY_COMPILER)).fullmatch(path) is not None


def _pattern(texts: tuple[str, ...]) -> re.Pattern[str]:
    if texts not in _compiled:
        _compiled[texts] = re.compile("|".join(f"(?:{text})" for text in texts), re.DOTALL)
    return _compiled[texts]
