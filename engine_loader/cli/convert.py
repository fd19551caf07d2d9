"""``engine-loader convert``: converts training checkpoints to Hugging Face checkpoints, and back."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console.output import byte_progress_bar, console, count, print_json, printable

if TYPE_CHECKING:
    import torch


class Kind(StrEnum):
    """Values of --to; for the last one, the command refuses and names ``engine-loader reshard``."""

    SAFETENSORS = "safetensors"
    DCP = "dcp"
    SHARDED_STATE = "sharded_state"


class Items(StrEnum):
    """How torch.distributed.checkpoint stores tensors."""

    TORCH_SAVE = "torch_save"
    SAFETENSORS = "safetensors"


class Dtype(StrEnum):
    """Element types of weights that engines serve."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="A directory or prefix (also s3://…) with a training checkpoint or safetensors."
        ),
    ],
    destination: Annotated[str, typer.Argument(metavar="DST", help="The directory to write; new or empty.")],
    *,
    to: Annotated[
        Kind,
        typer.Option(help="safetensors: as on the Hugging Face hub; dcp: torch.distributed.checkpoint."),
    ] = Kind.SAFETENSORS,
    items: Annotated[Items, typer.Option(help="How dcp stores tensors.")] = Items.TORCH_SAVE,
    key_mapping: Annotated[
        str | None,
        typer.Option(
            help='New names: JSON of regular expressions and replacements, {"^model[.]": ""}, null leaves tensors out; '
            'or "module:function"; rules, or the name of a layout (torchtitan-llama, …; --to dcp leads back).'
        ),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Convert floating-point tensors of 16 bits and more.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="The largest size of a safetensors file.")] = "5GB",
    optimizer_state: Annotated[
        bool,
        typer.Option(
            "--optimizer-state",
            help="Also convert what is not the model's (optimizers, averaged copies, states of random generators), and "
            "to dcp the items that are not tensors.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint that is in DST.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Convert between training checkpoints (torch.distributed.checkpoint) and Hugging Face safetensors.

    Tensors are streamed: this needs memory for one tensor and for what is read ahead. DST appears only when it is
    complete, also after Ctrl-C. config.json, the tokenizer and the other files beside the weights are copied. vLLM
    serves a training checkpoint without conversion (`--load-format b10_3fs`).

    `engine-loader reshard` makes a sharded_state checkpoint from a converted one, or from a training checkpoint with a
    config.json. A sharded_state checkpoint cannot be converted back.

    **Examples**

    ```shell
    engine-loader convert checkpoints/step-1000 /models/mine --key-mapping '{"^model[.]": ""}'
    engine-loader convert s3://bucket/step-1000 /models/mine --dtype bfloat16
    engine-loader convert /models/llama checkpoints/start --to dcp
    ```
    """
    from ..errors import CheckpointError
    from ..report.load_report import human_bytes

    if to is Kind.SHARDED_STATE:
        raise CheckpointError(
            "a sharded_state checkpoint is written by the engine itself, for one parallel layout",
            hint=f"engine-loader reshard {source} {destination} --tensor-parallel-size N",
        )
    from ..sources.hub_models import model_here

    source = model_here(source)
    max_shard_bytes, mapping = _bytes(max_shard_size), _mapping(key_mapping)
    from ..conversion import convert_checkpoint

    with byte_progress_bar() as progress:
        done = convert_checkpoint(
            source,
            destination,
            to="dcp" if to is Kind.DCP else "safetensors",
            items="safetensors" if items is Items.SAFETENSORS else "torch_save",
            key_mapping=mapping,
            optimizer_state=optimizer_state,
            dtype=_dtype(dtype),
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        written = {"files": [str(file) for file in done.files], "tensors": done.tensors, "bytes": done.nbytes}
        print_json({"destination": destination, **written, "left_out": done.left_out.removeprefix("left out: ")})
        return
    left_out = f"; {done.left_out}" if done.left_out else ""
    console().print(
        f"{printable(destination)}: {count(len(done.files), 'file')}, {done.tensors} tensors, "
        f"{human_bytes(done.nbytes)}{left_out}",
        soft_wrap=True,
    )


def _mapping(text: str | None) -> Any:
    """The value of --key-mapping, checked like the setting ``key_mapping``."""
    if text is None:
        return None
    from ..settings import load_settings

    return load_settings({"key_mapping": text}, {}, extra_origin="--key-mapping").settings.loader.key_mapping


def _bytes(text: str) -> int:
    from pydantic import TypeAdapter, ValidationError

    from ..errors import SettingsError
    from ..settings.kinds import Size

    try:
        nbytes = int(TypeAdapter(Size).validate_python(text))
    except ValidationError as error:
        raise SettingsError(f"--max-shard-size: {text!r} is not a size like 5GB or 512MiB") from error
    if nbytes < 1:
        raise SettingsError(f"--max-shard-size: {text!r} is less than one byte")
    return nbytes


def _dtype(name: Dtype | None) -> torch.dtype | None:
    if name is None:
        return None
    import torch

    found: torch.dtype = getattr(torch, name.value)
    return found
