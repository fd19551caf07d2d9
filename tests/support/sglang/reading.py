"""What SGLang reads of checkpoints by its own loader and by ours, in one process without an engine; for tests.

    python reading.py DIRECTORY...

Prints a JSON object behind "READING ": directory -> load format -> name -> sum of the tensor. What "auto" is for each
directory, SGLang's ServerArgs decide, as in a server ("asked"). What a model with layers of multi-token prediction
reads besides is read, too.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

OPTIONS = ("--device", "cpu", "--context-length", "256")


def read(directory: str, load_format: str, extra: dict[str, Any]) -> dict[str, float]:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader, get_model_loader

    config = SimpleNamespace(architectures=["Glm4MoeForCausalLM"], num_nextn_predict_layers=1)
    source = DefaultModelLoader.Source(directory, revision=None, model_config=SimpleNamespace(hf_config=config))
    loader = get_model_loader(LoadConfig(load_format=load_format, model_loader_extra_config=extra))
    return {name: tensor.float().sum().item() for name, tensor in loader._get_weights_iterator(source)}


def resolved(arguments: Any) -> Any:
    """The options with what SGLang decides of them; older versions do that when they are made."""
    if not hasattr(arguments, "resolve_once"):
        return arguments
    from sglang.srt.arg_groups.overrides import resolving_view

    arguments.resolve_once()
    return resolving_view(arguments)


def main(*directories: str) -> None:
    from engine_loader.plugin import register

    register()
    from sglang.srt import server_args

    found = {}
    for directory in directories:
        arguments = server_args.prepare_server_args(["--model-path", directory, "--load-format", "auto", *OPTIONS])
        server_args.set_global_server_args_for_scheduler(arguments)
        own = resolved(arguments).load_format
        found[directory] = {"asked": own} | {
            "auto": read(directory, own, {}),
            "b10_3fs": read(directory, "b10_3fs", {"threads": 2}),
        }
    print("\nREADING " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
