"""Restores a compile cache before torch.compile and saves it after warm-up, for a program that is not vLLM or SGLang.

    export ENGINE_LOADER_COMPILE_CACHE__DIRECTORY=/mnt/shared/compile_cache    # or s3://bucket/prefix
    python examples/restore_compile_cache.py

Run it on a second machine (or after deleting TORCHINDUCTOR_CACHE_DIR): nothing is compiled there. Caches are code:
read docs/security.md before machines share them.
"""

import torch
from torch._dynamo.utils import counters

from engine_loader import load_compile_cache, save_compile_cache


@torch.compile
def score(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x @ x.T).softmax(-1).amax(-1)


def main() -> None:
    restored = load_compile_cache()  # before the first call of a compiled function; never raises, never hangs
    print(f"restore: {restored.name.lower()}")
    print(f"result: {score(torch.ones(8, 8)).sum().item():.4f}")  # the warm-up
    hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    print(f"found in the cache: {'yes' if hits else 'no'}")
    print(f"save: {save_compile_cache().name.lower()}")  # only what the store does not have yet


if __name__ == "__main__":
    main()
