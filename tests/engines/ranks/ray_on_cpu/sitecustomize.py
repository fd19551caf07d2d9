"""Lets vLLM's CPU build run under Ray's executor, which refuses it: "current platform cpu does not support ray".

What lacks is the name of the resource that a rank takes of Ray. A rank takes one of Ray's GPUs here, of which
``ray start --num-gpus`` says how many a node has. On the path (PYTHONPATH) of Ray's processes and of the server.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class OnRay(MetaPathFinder):
    name = "vllm.platforms.cpu"

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_name(module: ModuleType) -> None:
            execute(module)
            module.CpuPlatform.ray_device_key = "GPU"

        spec.loader.exec_module = execute_and_name  # type: ignore[method-assign]
        return spec


if "RAY_RANKS_ON_CPU" in os.environ:
    sys.meta_path.insert(0, OnRay())
