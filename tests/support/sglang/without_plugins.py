"""Run by SGLang's Python with a model's directory: what a process without plugins makes of its options, and those of a
model in a bucket. Some versions read the model's configuration for them.

Prints one line of JSON.
"""

import argparse
import json
import multiprocessing
import sys
from typing import Any

from engine_loader.engines.common import model_files


def loader_in_child(server_args: Any, answers: Any) -> None:
    """As an encoder worker: SGLang's configuration of the load, from the options, without loading plugins."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader import loader

    from engine_loader import plugin

    chosen = LoadConfig(load_format=server_args.load_format).load_format
    hooked = hasattr(loader.DefaultModelLoader.__init__, "_engine_loader_wrapper")
    answers.put([server_args.model_path, str(chosen), hooked, plugin.failures])


def parse(parser: argparse.ArgumentParser, *options: str) -> Any:
    """The options of a command line."""
    from sglang.srt.server_args import ServerArgs

    return ServerArgs.from_cli_args(parser.parse_args([*options, "--load-format", "b10_3fs", "--device", "cpu"]))


def main() -> None:
    """Print the line."""
    model = sys.argv[1]
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    child = spawn.Process(target=loader_in_child, args=(parse(parser, "--model-path", model), answers))
    child.start()
    try:
        answer = answers.get(timeout=120)
    finally:
        child.kill()

    model_files.local_copy = lambda url, settings: model
    bucket = parse(
        parser,
        *("--model-path", "s3://models/llama/", "--tokenizer-path", "s3://models/llama"),
        *("--model-loader-extra-config", '{"threads": 3}'),
    )
    print("ANSWER", json.dumps({"child": answer, "bucket": [getattr(bucket, name) for name in BUCKET]}))


BUCKET = ("model_path", "tokenizer_path", "model_loader_extra_config", "served_model_name")

if __name__ == "__main__":
    main()
