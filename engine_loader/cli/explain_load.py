"""``engine-loader explain-load``: the bytes that one rank would read of a checkpoint, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console.engine_output import quiet_engine
from .console.output import console, print_json, print_warning, printable, table

if TYPE_CHECKING:
    from ..engines.vllm.rank import Rank
    from ..loading.direct.dry_run import Explanation

_SHOWN = 12


def explain_load(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The model's directory, s3://…, or OWNER/NAME of the hub's cache.")
    ],
    *,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", min=1)] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option("--pipeline-parallel-size", "-pp", min=1)] = 1,
    expert_parallel: Annotated[
        bool, typer.Option("--enable-expert-parallel", help="Each rank has whole experts, some of all.")
    ] = False,
    rank: Annotated[
        int, typer.Option(min=0, help="Which of the ranks: 0 to tensor- times pipeline-parallel size - 1.")
    ] = 0,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what one rank of vLLM reads of a checkpoint: for each kind of layer, bytes in the files, kept and read.

    vLLM's model of that rank is built in this process, and vLLM's own code loads tensors without data into it. This
    needs vLLM, but no GPU, and little memory, because the parameters are never filled.

    **Examples**

    ```shell
    engine-loader explain-load /models/llama -tp 4 --rank 3
    engine-loader explain-load /models/mixtral -tp 8 --enable-expert-parallel --json | jq .totals.experts
    ```
    """
    from ..engines.vllm.rank import Rank
    from ..sources.hub_models import model_here

    model = model_here(model)
    which = Rank(tensor_parallel_size, pipeline_parallel_size, rank, expert_parallel)
    with quiet_engine("explaining the load"):
        explanation = _explain(model, which)
    if as_json:
        layout = {"rank": rank, "tensor_parallel_size": tensor_parallel_size}
        layout |= {"pipeline_parallel_size": pipeline_parallel_size, "expert_parallel": expert_parallel}
        print_json({"model": model, **layout, **explanation.as_dict(tensors=tensors, ranks=which.world_size)})
    else:
        _print(explanation, which.world_size, tensors=tensors)


def _explain(model: str, rank: Rank) -> Explanation:
    from ..engines.vllm.rank import rank_model

    with rank_model(model, rank) as built:
        explanation: Explanation = built.loader.explain(built.module, built.config.model_config)
        return explanation


def _print(explanation: Explanation, ranks: int, *, tensors: bool) -> None:
    from ..report.load_report import human_bytes

    out = console()
    rows = [
        (
            kind,
            f"{row['tensors']:,}",
            f"{row['not_read']:,}",
            human_bytes(row["file_bytes"]),
            human_bytes(row["kept_bytes"]),
            human_bytes(row["read_bytes"]),
            f"{row['read_bytes'] / row['kept_bytes']:.2f}" if row["kept_bytes"] else "-",
            f"{row['reads']:,}",
        )
        for kind, row in explanation.totals().items()
    ]
    columns = ("kind", "tensors", "not read", "in files", "kept", "read", "read/kept", "reads")
    out.print(table(columns, rows, right=tuple(range(1, 8))))
    out.print()
    if ranks > 1:
        apart, together = map(human_bytes, explanation.machine_bytes(ranks))
        out.print(f"{ranks} ranks on one machine read about {together} together, {apart} with share: off")
    for text in sorted(set(explanation.files.values())):
        out.print(f"files are read {text}", soft_wrap=True)
    plans = list(explanation.tensors.values())
    as_data = [plan for plan in plans if plan.why]
    if as_data:
        out.print()
        shown = [(printable(p.info.name), human_bytes(p.read_bytes), ", ".join(p.why)) for p in as_data[:_SHOWN]]
        out.print(table((f"{len(as_data)} needed as data", "read", "for"), shown, right=(1,)))
    if tensors:
        out.print()
        listed = [_tensor_row(plan) for plan in plans]
        out.print(table(("tensor", "in files", "kept", "read", "reads", "how"), listed, right=(1, 2, 3, 4)))
    if explanation.obstacle:
        print_warning(f"mode auto streams this model: {explanation.obstacle}")


def _tensor_row(plan: Any) -> tuple[str, ...]:
    from ..report.load_report import human_bytes

    sizes = map(human_bytes, (plan.info.nbytes, plan.kept_bytes, plan.read_bytes))
    return printable(plan.info.name), *sizes, f"{plan.reads:,}", ", ".join(plan.ways) or "not read"
