"""``engine-loader reshard``: a checkpoint in which every rank finds its own parameters."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .console.output import console, printable, progress_bar
from .explain_load import quiet_engine


def reshard(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model's directory.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where to write; new or empty.")],
    *,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", min=1)],
    pipeline_parallel_size: Annotated[int, typer.Option("--pipeline-parallel-size", "-pp", min=1)] = 1,
    expert_parallel: Annotated[
        bool, typer.Option("--enable-expert-parallel", help="Whole experts, spread over the ranks.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="The element type that will be served, as vLLM's --dtype.")] = "auto",
    max_file_gib: Annotated[float, typer.Option(min=0.001, help="A rank's files are cut at this size.")] = 5.0,
) -> None:
    """Write a sharded_state checkpoint, the one that vLLM's save_sharded_state writes, for one parallel layout.

    It needs vLLM, no GPU, and memory for one rank's parameters. Serve it with `--load-format b10_3fs` (or vLLM's
    sharded_state) and the same sizes. b10_3fs reads from an ordinary checkpoint little more than each rank keeps; this
    saves the rest.

    **Example**

    ```shell
    engine-loader reshard /models/llama /models/llama-tp4 --tensor-parallel-size 4
    vllm serve /models/llama-tp4 --load-format b10_3fs --tensor-parallel-size 4
    ```
    """
    from ..engines.vllm.rank import Rank
    from ..report.load import human_bytes

    layout = Rank(tensor_parallel_size, pipeline_parallel_size, 0, expert_parallel)
    with progress_bar(layout.world_size + 1) as step, quiet_engine():
        from ..engines.vllm.sharded import reshard as write

        files = write(model, out, layout, max_file_bytes=int(max_file_gib * (1 << 30)), step=step, dtype=dtype)
    nbytes = human_bytes(sum(os.path.getsize(file) for file in files))
    console().print(f"{printable(out)}: {len(files)} files, {nbytes}, for {layout.world_size} ranks", soft_wrap=True)
