"""``engine-loader reshard``: writes a checkpoint with separate files for every rank."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .console.engine_output import quiet_engine
from .console.output import console, printable, progress_bar


def reshard(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model's directory.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The directory to write; new or empty.")],
    *,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", min=1)],
    pipeline_parallel_size: Annotated[int, typer.Option("--pipeline-parallel-size", "-pp", min=1)] = 1,
    expert_parallel: Annotated[
        bool, typer.Option("--enable-expert-parallel", help="Each rank has whole experts, some of all.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="The element type of the parameters, as for vLLM's --dtype.")] = "auto",
    max_file_gib: Annotated[
        float, typer.Option(min=0.001, help="The most GiB in a file; a rank has as many files as needed.")
    ] = 5.0,
) -> None:
    """Write a sharded_state checkpoint for one parallel layout, in the format of vLLM's save_sharded_state.

    This needs vLLM and memory for one rank's parameters, but no GPU. Serve the checkpoint with `--load-format b10_3fs`
    (or vLLM's sharded_state) and the same parallel sizes. From an ordinary checkpoint, b10_3fs reads little more than
    each rank keeps; from this one it reads exactly that.

    **Example**

    ```shell
    engine-loader reshard /models/llama /models/llama-tp4 --tensor-parallel-size 4
    vllm serve /models/llama-tp4 --load-format b10_3fs --tensor-parallel-size 4
    ```
    """
    from ..engines.vllm.rank import Rank
    from ..report.load_report import human_bytes
    from ..sources.hub_models import model_here

    model = model_here(model)
    layout = Rank(tensor_parallel_size, pipeline_parallel_size, 0, expert_parallel)
    with progress_bar(layout.world_size + 1) as step, quiet_engine("resharding"):
        from ..engines.vllm.sharded import reshard as write

        files = write(model, out, layout, max_file_bytes=int(max_file_gib * (1 << 30)), step=step, dtype=dtype)
    nbytes = human_bytes(sum(os.path.getsize(file) for file in files))
    console().print(f"{printable(out)}: {len(files)} files, {nbytes}, for {layout.world_size} ranks", soft_wrap=True)
