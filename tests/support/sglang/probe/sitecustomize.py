"""Makes SGLang's schedulers write what their models hold into $SGLANG_PROBE: a hash of the bytes of every parameter.
With SGLANG_PROBE_BESIDE they read the checkpoint that it names besides, and write what was in it.
With SGLANG_PROBE_COMPILES they compile a function besides, where others compile the model, and write what came of it:
the variable names the function of torch.nn.functional that is in it.

On the path of a server that a test starts (PYTHONPATH), it is imported by every process of it.
"""

import functools
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def write_digests(scheduler: Any) -> None:
    import torch

    model = scheduler.tp_worker.model_runner.model
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    digests = {}
    for name, tensor in state.items():
        content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        digests[name] = hashlib.sha256(content).hexdigest()
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    with open(os.path.join(os.environ["SGLANG_PROBE"], f"rank-{rank}.json"), "w") as file:
        json.dump(digests, file)


def compile_something(scheduler: Any) -> None:
    import torch
    from torch._dynamo.utils import counters

    weight = scheduler.tp_worker.model_runner.model.lm_head.weight.detach()

    activation = getattr(torch.nn.functional, os.environ["SGLANG_PROBE_COMPILES"])

    @torch.compile
    def score(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        return activation(hidden @ weight.t()).softmax(-1).amax(-1)

    with torch.no_grad():
        score(torch.ones(4, weight.shape[1], dtype=weight.dtype), weight)
    found = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")}
    with open(os.path.join(os.environ["SGLANG_PROBE"], "compiled.json"), "w") as file:
        json.dump(found, file)


def read_beside(directory: str) -> None:
    """What is read of a checkpoint for a model with a file of multi-token prediction, for a draft model of one layer of
    such, and for a LoRA adapter.
    """
    from types import SimpleNamespace

    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader, get_model_loader

    source = DefaultModelLoader.Source(directory, revision=None)
    config = SimpleNamespace(architectures=["Glm4MoeForCausalLM"], num_nextn_predict_layers=1)
    whole = DefaultModelLoader.Source(directory, revision=None, model_config=SimpleNamespace(hf_config=config))
    found = {}
    for load_format in ("auto", "b10_3fs"):
        draft = get_model_loader(LoadConfig(load_format=load_format, draft_model_idx=1))
        adapter = DefaultModelLoader(LoadConfig(load_format=load_format, model_loader_extra_config={}))
        model = get_model_loader(LoadConfig(load_format=load_format))
        for kind, loader, wanted in (("draft", draft, source), ("adapter", adapter, source), ("model", model, whole)):
            weights = loader._get_weights_iterator(wanted)
            found[f"{kind} {load_format}"] = {name: tensor.float().sum().item() for name, tensor in weights}
    with open(os.path.join(os.environ["SGLANG_PROBE"], "beside.json"), "w") as file:
        json.dump(found, file)


class AfterScheduler(MetaPathFinder):
    name = "sglang.srt.managers.scheduler"

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_wrap(module: ModuleType) -> None:
            execute(module)
            original = module.Scheduler.init_model_worker

            @functools.wraps(original)
            def init_model_worker(scheduler: Any, *args: Any, **options: Any) -> Any:
                result = original(scheduler, *args, **options)
                write_digests(scheduler)
                if "SGLANG_PROBE_BESIDE" in os.environ:
                    read_beside(os.environ["SGLANG_PROBE_BESIDE"])
                if "SGLANG_PROBE_COMPILES" in os.environ:
                    compile_something(scheduler)
                return result

            module.Scheduler.init_model_worker = init_model_worker

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


if "SGLANG_PROBE" in os.environ:
    sys.meta_path.insert(0, AfterScheduler())
