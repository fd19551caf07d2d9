"""``engine-loader inspect``: shows the contents of a checkpoint, and checks it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console.output import console, print_json, print_warning, printable, table

if TYPE_CHECKING:
    from ..errors import CheckpointError
    from ..formats.safetensors import Header, TensorInfo
    from .inspection.result import Survey

_LARGEST = 5
_FILES_SHOWN = 20
_OTHERS_SHOWN = 5


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A model's or a training checkpoint's directory, or one .safetensors file; also s3://…, and "
            "OWNER/NAME of the hub's local cache.",
        ),
    ],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Check every header, and the index against the files; report every problem."),
    ] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
) -> None:
    """Show a checkpoint's files, tensors, element types and bytes. Only headers are read.

    A training checkpoint (torch.distributed.checkpoint) is shown with the names of the training; --check compares each
    stored tensor with the metadata.

    With --check, every problem is listed, and the exit status is 1 if there is one.

    **Examples**

    ```shell
    engine-loader inspect /models/llama
    engine-loader inspect --check /models/llama
    engine-loader inspect s3://bucket/models/llama
    engine-loader inspect --tensors --json model.safetensors | jq '.tensors[].name'
    ```
    """
    from ..sources.hub_models import model_here
    from .inspection import survey

    path = model_here(path)
    found = survey.check(path) if check else survey.read(path)
    if as_json:
        print_json(_as_dict(path, found, check=check, tensors=tensors))
    else:
        _print(found, tensors=tensors)
        if check:
            _print_check(path, found)
    if found.problems:
        raise typer.Exit(1)


def _as_dict(path: str, found: Survey, *, check: bool, tensors: bool) -> dict[str, Any]:
    infos = found.tensors
    answer: dict[str, Any] = {
        "path": path,
        "format": "safetensors" if found.whole is None else "torch.distributed.checkpoint",
        "index": None if found.index is None else found.index.file,
        "totals": {
            "files": len(found.headers),
            "file_bytes": sum(header.file_bytes for header in found.headers),
            "tensors": len(infos),
            "tensor_bytes": sum(info.nbytes for info in infos),
        },
        "dtypes": [{"dtype": dtype, "tensors": count, "bytes": nbytes} for dtype, count, nbytes in _dtypes(infos)],
        "largest": [_tensor(info) for info in _largest(infos)],
        "files": [_file(header) for header in found.headers],
    }
    if tensors:
        answer["tensors"] = [_tensor(info) for info in infos]
        if found.whole is not None:
            answer["other_items"] = found.other_items
    if check:
        problems = [_problem(error) for error in found.problems]
        answer["check"] = {"sound": not problems, "problems": problems, "notes": found.notes}
    return answer


def _file(header: Header) -> dict[str, Any]:
    return {
        "file": header.file,
        "bytes": header.file_bytes,
        "header_bytes": header.header_bytes,
        "tensors": len(header.tensors),
        "metadata": dict(header.metadata),
    }


def _tensor(info: TensorInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "dtype": info.dtype,
        "shape": list(info.shape),
        "bytes": info.nbytes,
        "file": info.file,
        "offset": info.offset,
    }


def _problem(error: CheckpointError) -> dict[str, Any]:
    return {"file": error.file, "offset": error.offset, "message": error.message, "hint": error.hint}


def _dtypes(infos: Iterable[TensorInfo]) -> list[tuple[str, int, int]]:
    """(element type, tensors, bytes), the most bytes first."""
    counts: dict[str, tuple[int, int]] = {}
    for info in infos:
        count, nbytes = counts.get(info.dtype, (0, 0))
        counts[info.dtype] = (count + 1, nbytes + info.nbytes)
    return sorted(((dtype, *both) for dtype, both in counts.items()), key=lambda row: -row[2])


def _largest(infos: Iterable[TensorInfo]) -> list[TensorInfo]:
    return sorted(infos, key=lambda info: -info.nbytes)[:_LARGEST]


def _print(found: Survey, *, tensors: bool) -> None:
    from ..report.load_report import human_bytes

    infos, out = found.tensors, console()
    if found.headers:
        shown = [*(_file_row(header) for header in found.headers[:_FILES_SHOWN])]
        more = len(found.headers) - len(shown)
        shown += [(f"… and {more} more files (--json lists them)", "", "")] if more > 0 else []
        out.print(table(("file", "tensors" if found.whole is None else "parts of tensors", "size"), shown))
        rows = [(dtype, f"{count:,}", human_bytes(nbytes)) for dtype, count, nbytes in _dtypes(infos)]
        total = ("all", f"{len(infos):,}", human_bytes(sum(info.nbytes for info in infos)))
        out.print()
        out.print(table(("dtype", "tensors", "size"), [*rows, total] if len(rows) != 1 else rows))
        listed = infos if tensors else _largest(infos)
        out.print()
        heading = "tensor" if tensors else f"largest {len(listed)} tensors"
        out.print(table((heading, "shape", "dtype", "size"), map(_tensor_row, listed), right=(3,)))
    if found.other_items:
        names = ", ".join(map(printable, found.other_items[:_OTHERS_SHOWN]))
        end = ", …" if len(found.other_items) > _OTHERS_SHOWN else ""
        out.print()
        count = len(found.other_items)
        said = "1 item is not a tensor" if count == 1 else f"{count:,} items are not tensors"
        out.print(f"{said}: {names}{end}", soft_wrap=True, markup=False)


def _print_check(path: str, found: Survey) -> None:
    from rich.text import Text

    for note in found.notes:
        print_warning(note)
    out = console()
    out.print()
    if not found.problems:
        against = ", and the index fits them" if found.index is not None else ""
        count = len(found.headers)
        files = f"{count} file{'' if count == 1 else 's'}"
        sound = f"sound: the header{'' if count == 1 else 's'} of {files}{against}"
        if found.whole is not None:
            sound = f"sound: {files}, and the metadata fits {'it' if count == 1 else 'them'}"
        out.print(Text(sound, "green"), soft_wrap=True)
        return
    for error in found.problems:
        out.print(Text(f"✗ {printable(str(error))}", "red"), soft_wrap=True)
    count = len(found.problems)
    out.print(Text(f"{count} problem{'' if count == 1 else 's'} in {printable(path)}", "bold red"), soft_wrap=True)


def _file_row(header: Header) -> tuple[str, str, str]:
    from ..report.load_report import human_bytes

    return printable(header.file), f"{len(header.tensors):,}", human_bytes(header.file_bytes)


def _tensor_row(info: TensorInfo) -> tuple[str, str, str, str]:
    from ..report.load_report import human_bytes

    return printable(info.name), " × ".join(map(str, info.shape)) or "scalar", info.dtype, human_bytes(info.nbytes)
