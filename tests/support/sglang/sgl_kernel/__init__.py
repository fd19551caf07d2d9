"""A stand-in for sgl_kernel on a machine without a GPU, for tests; install.sh puts it beside SGLang.

No library of operators is loaded, so torch.ops.sgl_kernel has none and SGLang's cpu_has_amx_support() is False: it then
uses its own torch-native code. Any other name is a function that raises when it is called, so that what SGLang imports
at module level is there.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__version__ = "0.0.0+stub"


def assign_req_to_token_pool_cpu(
    req_pool_indices: "torch.Tensor",
    req_to_token: "torch.Tensor",
    start: "torch.Tensor",
    end: "torch.Tensor",
    out_cache_loc: "torch.Tensor",
    pool_len: int,
) -> None:
    position = 0
    for i in range(req_pool_indices.numel()):
        first, last, row = int(start[i]), int(end[i]), int(req_pool_indices[i])
        req_to_token[row, first:last] = out_cache_loc[position : position + last - first].to(req_to_token.dtype)
        position += last - first


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **options: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel of the tests has no {name}")

    missing.__name__ = name
    return missing
