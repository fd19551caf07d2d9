"""What is cached for each engine: directories, the variables that name them, which of their files are never shared, and
which hold code for the host's processor.

Read in vLLM 0.10 to 0.33, SGLang 0.5.9 to 0.5.23, torch 2.14, Triton 3.9, CuTe DSL, QuACK, FlashAttention, MiniMax's
sparse attention, b12x and FlyDSL; the rest as their documentation has it.
"""

from __future__ import annotations

import getpass
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path

from ..home import temporary_directory_name
from .host.groups import Code
from .ownership import open_to_others

STATE = ".engine_loader"
"""This package's directory in a local cache: locks, notes, and files being unpacked. Never packed."""

_PRIVATE = "private-"
"""Begins the name of a user's own directory in a cache that others may write; the user's number follows."""
_ALWAYS_OUT = (
    f"{STATE}/*",
    f"{_PRIVATE}*/*",
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
            default, "<temporary>" the user's directory below the temporary one. Empty: there is no such cache then.
        below: what the component itself adds to the variable's value.
        only: patterns of what is taken; empty: everything.
        out: patterns of what is left: it holds for one machine, is no cache of compiled code, or belongs to a running
            process.
        code: pattern -> what the files depend on whose path matches; the first that matches counts, and files that
            match none hold on any host.
    """

    name: str
    variable: str
    default: str
    below: str = ""
    only: tuple[str, ...] = ()
    out: tuple[str, ...] = ()
    code: tuple[tuple[str, Code], ...] = ()

    def is_used(self, environ: Mapping[str, str] | None = None) -> bool:
        """Whether there is such a cache in this process."""
        environ = os.environ if environ is None else environ
        return bool(self.default or environ.get(self.variable))

    def directory(self, environ: Mapping[str, str] | None = None) -> Path:
        """Where it is in this process."""
        named = self.named_directory(environ)
        return named if self.below else Path(private_place(str(named)))

    def named_directory(self, environ: Mapping[str, str] | None = None) -> Path:
        """Where the variable or the default has it: others may be able to write there."""
        environ = os.environ if environ is None else environ
        value = environ.get(self.variable)
        if not value:
            value = self.default.replace("<inductor>", default_inductor_directory())
            value = value.replace("<temporary>", os.path.join(temporary_directory_name(), _user()))
            value = value.replace("<cache>", environ.get("XDG_CACHE_HOME") or "~/.cache")
        return Path(os.path.abspath(os.path.expanduser(value))) / self.below

    def takes(self, path: str) -> bool:
        """Whether the file at ``path``, relative to the directory, belongs in a pack."""
        if _pattern((*_ALWAYS_OUT, *self.out)).fullmatch(path):
            return False
        return not self.only or _pattern(self.only).fullmatch(path) is not None

    def depends_on(self, path: str) -> Code:
        """What the file at ``path``, relative to the directory, depends on."""
        patterns = _patterns(tuple(pattern for pattern, _ in self.code))
        found = (code for pattern, (_, code) in zip(patterns, self.code, strict=True) if pattern.fullmatch(path))
        return next(found, "any")


_TRITON_CODE: tuple[tuple[str, Code], ...] = (("*.so", "native"),)  # launchers; kernels are the GPU's
_TOOLKIT_LIBRARIES: tuple[tuple[str, Code], ...] = (("*.so", "toolkit"),)
_ALL_BY_TOOLKIT: tuple[tuple[str, Code], ...] = (("*.cubin", "any"), ("*", "toolkit"))
# Graphs are made for the width of the host's vectors, so they count as host code together with inductor's libraries.
_INDUCTOR_CODE: tuple[tuple[str, Code], ...] = (("triton/*.so", "native"), ("triton/*", "any"), ("*", "native"))

INDUCTOR = CacheRoot("inductor", "TORCHINDUCTOR_CACHE_DIR", "<inductor>", code=_INDUCTOR_CODE)
TRITON = CacheRoot("triton", "TRITON_CACHE_DIR", "~/.triton/cache", code=_TRITON_CODE)
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
    code=(
        ("*/triton_cache/*.so", "native"),
        ("*/triton_cache/*", "any"),
        ("torch_compile_cache/*", "native"),
        ("torch_aot_compile/*", "native"),
        *_TOOLKIT_LIBRARIES,
    ),
)
VLLM_MODEL_INFOS = CacheRoot("vllm", "VLLM_CACHE_ROOT", "<cache>/vllm", only=("modelinfos/*.json",))
"""One file an architecture, needed before there is an engine: it has a key of its own."""
SHARED = (
    INDUCTOR,
    TRITON,
    CacheRoot("flashinfer", "FLASHINFER_WORKSPACE_BASE", "~", below=".cache/flashinfer", code=_ALL_BY_TOOLKIT),
    CacheRoot("deep_gemm", "DG_JIT_CACHE_DIR", "~/.deep_gemm", code=_TOOLKIT_LIBRARIES),
    CacheRoot("tvm_ffi", "TVM_FFI_CACHE_DIR", "~/.cache/tvm-ffi", code=_ALL_BY_TOOLKIT),
    # The plugin sets it: by default it lies below the temporary directory, which a container loses.
    CacheRoot("cute_dsl", "CUTE_DSL_CACHE_DIR", "<cache>/cute_dsl"),
    CacheRoot("tilelang", "TILELANG_CACHE_DIR", "~/.tilelang/cache", code=_ALL_BY_TOOLKIT),
    CacheRoot("helion", "HELION_CACHE_DIR", "~/.cache/helion"),
    CacheRoot("cuda", "CUDA_CACHE_PATH", "~/.nv/ComputeCache"),
    CacheRoot("humming", "HUMMING_CACHE_DIR", "~/.humming/cache", code=_TOOLKIT_LIBRARIES),
    CacheRoot("b12x", "B12X_COMPILE_CACHE_DIR", "<cache>/b12x/compile", code=_ALL_BY_TOOLKIT),
    CacheRoot("minfer_fmha", "MINFER_FMHA_CACHE_DIR", "~/.cache/minfer/fmha_sm100", code=_ALL_BY_TOOLKIT),
    CacheRoot("minfer_sparse", "MM_SPARSE_ATTN_AOT_CACHE", "~/.cache/minfer/mm_sparse_attn", code=_ALL_BY_TOOLKIT),
    CacheRoot("torch_extensions", "TORCH_EXTENSIONS_DIR", "<cache>/torch_extensions", code=_ALL_BY_TOOLKIT),
    # Filled with FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1.
    CacheRoot(
        "flash_attention",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR",
        "<temporary>/flash_attention_cute_dsl_cache",
        code=_ALL_BY_TOOLKIT,
    ),
    CacheRoot("quack", "QUACK_CACHE_DIR", "<temporary>/quack_cache", code=_ALL_BY_TOOLKIT),
    CacheRoot("flydsl", "FLYDSL_RUNTIME_CACHE_DIR", "~/.flydsl/cache", code=_ALL_BY_TOOLKIT),
)
"""What several engines fill."""
_VLLM_AUTOTUNE = CacheRoot("flashinfer_autotune", "VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR", "", only=("*.json",))
"""FlashInfer's measurements, where they do not lie below VLLM_CACHE_ROOT."""
SGLANG = CacheRoot(
    "sglang",
    "SGLANG_CACHE_DIR",
    "~/.cache/sglang",  # whatever XDG_CACHE_HOME says
    # Also below it: weights of models, and tables made of them; what cargo builds from; what one physical GPU measured,
    # and what was measured to be looked at.
    out=(
        "gpu_p2p_access_cache_for_*",
        "model_streamer/*",
        "ple/*",
        "diffusion/*",
        "*/precompiled_headers/*",
        "rust_extensions/targets/*",
        "flashinfer/autotune/*/rank_*_gpu*.json",
        "flashinfer/autotune/*runs/*",
        "flashinfer/autotune/flux3_prims_ts/*",  # a file for each rank, whose layout is not known here
    ),
    code=(
        ("triton/*.so", "native"),
        ("triton/*", "any"),
        ("inductor/triton/*.so", "native"),
        ("inductor/triton/*", "any"),
        ("inductor/*", "native"),
        ("flashinfer/autotune/*", "any"),
        ("deep_gemm/*.so", "toolkit"),
        ("deep_gemm/*", "any"),
        ("cuda/*", "any"),
        *_ALL_BY_TOOLKIT,
    ),
)
"""From about 0.5.18, SGLang has Triton, inductor, CUDA, FlashInfer, TileLang and DeepGEMM put their caches below it."""
_SGLANG_DEEP_GEMM = CacheRoot("deep_gemm", "SGLANG_DG_CACHE_DIR", "~/.cache/deep_gemm", code=_TOOLKIT_LIBRARIES)
"""Where SGLang has DeepGEMM put its cache before that."""
_SGLANG_OWN = (
    # Does not follow SGLANG_CACHE_DIR.
    CacheRoot("sglang_jit", "SGLANG_JIT_CACHE_DIR", "~/.cache/sglang/jit", code=_ALL_BY_TOOLKIT),
    # Below SGLANG_CACHE_DIR where it is not named.
    CacheRoot("sglang_cute", "SGLANG_CUTE_AOT_CACHE_DIR", "~/.cache/sglang/cute_aot", code=_ALL_BY_TOOLKIT),
)
ENGINES: Mapping[str, tuple[CacheRoot, ...]] = {
    "vllm": (VLLM, *SHARED, _VLLM_AUTOTUNE),
    "sglang": (SGLANG, *_SGLANG_OWN, *(_SGLANG_DEEP_GEMM if root.name == "deep_gemm" else root for root in SHARED)),
    "torch": (INDUCTOR, TRITON),
}
"""Engine -> its caches; "torch" is plain torch.compile."""
_BY_NAME = {root.name: root for roots in ENGINES.values() for root in roots}


def depends_on(path: str) -> Code:
    """What the file at ``path``, as in packs, depends on."""
    name, _, below = path.partition("/")
    root = _BY_NAME.get(name)
    return "any" if root is None else root.depends_on(below)


def directories_of(engine: str, environ: Mapping[str, str] | None = None) -> dict[str, Path]:
    """Name of a cache -> its directory. One that lies inside another is taken with that one."""
    found: dict[str, Path] = {}
    for root in (root for root in ENGINES[engine] if root.is_used(environ)):
        directory = root.directory(environ)
        if not any(directory == other or other in directory.parents for other in found.values()):
            found[root.name] = directory
    return found


def private_place(directory: str) -> str:
    """The directory of this user's own below one that others may write, where ``name_private_directories`` made one;
    else ``directory``.
    """
    try:
        if open_to_others(os.stat(directory)) is None:
            return directory
        own = os.path.join(directory, f"{_PRIVATE}{os.geteuid()}")
        facts = os.lstat(own)
    except (OSError, ValueError):
        return directory
    is_own = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and open_to_others(facts) is None
    return own if is_own else directory


def name_private_directories(engine: str, make: Callable[[], bool]) -> list[str]:
    """Have an engine keep those of its caches that others may write in directories of this user's own below them:
    make these, and set the variables that name them.

    Such a cache is never restored or saved, for caches are code: volumes of pods (an emptyDir has mode 777, one with
    fsGroup 2775) and homes of users with arbitrary numbers.

    Args:
        make: whether directories are to be made; called only when there is something to make.

    Returns:
        A line for a person for each variable that was set.
    """
    lines = []
    for root in ENGINES[engine]:
        if not root.is_used() or root.below:
            continue
        named = root.named_directory()
        own = private_place(str(named))
        if own == str(named):
            try:
                reason = open_to_others(os.stat(named))
                if reason is None or not make():
                    continue
                os.mkdir(os.path.join(named, f"{_PRIVATE}{os.geteuid()}"), 0o700)
            except (OSError, ValueError):
                continue
            own = private_place(str(named))
        if own != str(named):
            os.environ[root.variable] = own
            lines.append(f"others may write {named}, so {root.variable} is now {own}")
    return lines


def way_out(name: str, directory: str | os.PathLike[str]) -> str:
    """What to do about a cache that others may write."""
    root = _BY_NAME.get(name)
    variable = f"{root.variable}={os.fspath(directory).rstrip('/')}/private" if root is not None else "its variable"
    return (
        f"name a directory below it ({variable}), which is then made for this user alone, close it (`chmod go-w`), or "
        "take what anyone wrote (compile_cache.trust=anyone)"
    )


def default_inductor_directory() -> str:
    """Where inductor keeps its cache by default."""
    user = re.sub(r'[\\/:*?"<>|]', "_", _user())
    return os.path.join(temporary_directory_name(), f"torchinductor_{user}")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid_{os.getuid()}"  # a container's user without a name


_compiled: dict[tuple[str, ...], list[re.Pattern[str]]] = {}
_joined: dict[tuple[str, ...], re.Pattern[str]] = {}


def _pattern(texts: tuple[str, ...]) -> re.Pattern[str]:
    """One pattern for what matches any of ``texts``."""
    if texts not in _joined:
        _joined[texts] = re.compile("|".join(translate(text) for text in texts))
    return _joined[texts]


def _patterns(texts: tuple[str, ...]) -> list[re.Pattern[str]]:
    if texts not in _compiled:
        _compiled[texts] = [re.compile(translate(text)) for text in texts]
    return _compiled[texts]
