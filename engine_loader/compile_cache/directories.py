"""What is cached for each engine: directories, the variables that name them, and which of their files are never shared.

Read in vLLM 0.10 to 0.32, SGLang 0.5.9 to 0.5.23, torch 2.13, Triton 3.9, and the documentation of the rest.
"""

from __future__ import annotations

import getpass
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path

STATE = ".engine_loader"
"""This package's directory in a local cache: locks, notes, and files being unpacked. Never packed."""

_ALWAYS_OUT = (
    f"{STATE}/*",
    "*.tmp",
    "*.tmp.*",
    "*/tmp.*",
    "tmp.*",
    "*.lock",
    "locks/*",
    "*/locks/*",
    "*/__pycache__/*",
)


@dataclass(frozen=True)
class CacheRoot:
    """A cache of one component.

    Attributes:
        name: the first part of its files' paths in packs.
        variable: the environment variable that names its directory.
        default: the directory where the variable is not set; "<cache>" is XDG_CACHE_HOME, "<inductor>" torch's
            default.
        below: what the component itself adds to the variable's value.
        only: patterns of what is taken; empty: everything.
        out: patterns of what is left: it holds for one machine, is no cache of compiled code, or belongs to a running
            process.
    """

    name: str
    variable: str
    default: str
    below: str = ""
    only: tuple[str, ...] = ()
    out: tuple[str, ...] = ()

    def directory(self, environ: Mapping[str, str] | None = None) -> Path:
        """Where it is in this process."""
        environ = os.environ if environ is None else environ
        value = environ.get(self.variable)
        if not value:
            value = self.default.replace("<inductor>", default_inductor_directory())
            value = value.replace("<cache>", environ.get("XDG_CACHE_HOME") or "~/.cache")
        return Path(os.path.abspath(os.path.expanduser(value))) / self.below

    def takes(self, path: str) -> bool:
        """Whether the file at ``path``, relative to the directory, belongs in a pack."""
        if any(pattern.fullmatch(path) for pattern in _patterns((*_ALWAYS_OUT, *self.out))):
            return False
        return not self.only or any(pattern.fullmatch(path) for pattern in _patterns(self.only))


INDUCTOR = CacheRoot("inductor", "TORCHINDUCTOR_CACHE_DIR", "<inductor>")
TRITON = CacheRoot("triton", "TRITON_CACHE_DIR", "~/.triton/cache")
VLLM = CacheRoot(
    "vllm",
    "VLLM_CACHE_ROOT",
    "<cache>/vllm",
    out=(
        "gpu_p2p_access_cache_for_*",
        "assets/*",
        "xla_cache/*",
        "*dummy_cache/*",
        "modelinfos/*",
        "*/precompiled_headers/*",
    ),
)
VLLM_MODEL_INFOS = CacheRoot("vllm", "VLLM_CACHE_ROOT", "<cache>/vllm", only=("modelinfos/*.json",))
"""One file an architecture, needed before there is an engine: it has a key of its own."""
SHARED = (
    INDUCTOR,
    TRITON,
    CacheRoot("flashinfer", "FLASHINFER_WORKSPACE_BASE", "~", below=".cache/flashinfer"),
    CacheRoot("deep_gemm", "DG_JIT_CACHE_DIR", "~/.deep_gemm"),
    CacheRoot("tvm_ffi", "TVM_FFI_CACHE_DIR", "~/.cache/tvm-ffi"),
    CacheRoot("cute_dsl", "CUTE_DSL_CACHE_DIR", "~/.cache/cute_dsl"),
    CacheRoot("tilelang", "TILELANG_CACHE_DIR", "~/.tilelang/cache"),
    CacheRoot("helion", "HELION_CACHE_DIR", "~/.cache/helion"),
    CacheRoot("cuda", "CUDA_CACHE_PATH", "~/.nv/ComputeCache"),
)
"""What several engines fill."""
SGLANG = CacheRoot(
    "sglang",
    "SGLANG_CACHE_DIR",
    "~/.cache/sglang",  # whatever XDG_CACHE_HOME says
    # Also below it: weights of models, and tables made of them.
    out=("gpu_p2p_access_cache_for_*", "model_streamer/*", "ple/*", "*/precompiled_headers/*"),
)
"""From about 0.5.18, SGLang has Triton, inductor, CUDA, FlashInfer, TileLang and DeepGEMM put their caches below it."""
_SGLANG_DEEP_GEMM = CacheRoot("deep_gemm", "SGLANG_DG_CACHE_DIR", "~/.cache/deep_gemm")
"""Where SGLang has DeepGEMM put its cache before that."""
_SGLANG_OWN = (
    # Does not follow SGLANG_CACHE_DIR.
    CacheRoot("sglang_jit", "SGLANG_JIT_CACHE_DIR", "~/.cache/sglang/jit"),
    # Below SGLANG_CACHE_DIR where it is not named.
    CacheRoot("sglang_cute", "SGLANG_CUTE_AOT_CACHE_DIR", "~/.cache/sglang/cute_aot"),
)
ENGINES: Mapping[str, tuple[CacheRoot, ...]] = {
    "vllm": (VLLM, *SHARED),
    "sglang": (SGLANG, *_SGLANG_OWN, *(_SGLANG_DEEP_GEMM if root.name == "deep_gemm" else root for root in SHARED)),
    "torch": (INDUCTOR, TRITON),
}
"""Engine -> its caches; "torch" is plain torch.compile."""


def directories_of(engine: str, environ: Mapping[str, str] | None = None) -> dict[str, Path]:
    """Name of a cache -> its directory. One that lies inside another is taken with that one."""
    found: dict[str, Path] = {}
    for root in ENGINES[engine]:
        directory = root.directory(environ)
        if not any(directory == other or other in directory.parents for other in found.values()):
            found[root.name] = directory
    return found


def default_inductor_directory() -> str:
    """Where inductor keeps its cache by default."""
    try:
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, OSError):
        user = f"uid_{os.getuid()}"  # a container's user without a name
    return os.path.join(tempfile.gettempdir(), f"torchinductor_{user}")


_compiled: dict[tuple[str, ...], list[re.Pattern[str]]] = {}


def _patterns(texts: tuple[str, ...]) -> list[re.Pattern[str]]:
    if texts not in _compiled:
        _compiled[texts] = [re.compile(translate(text)) for text in texts]
    return _compiled[texts]
