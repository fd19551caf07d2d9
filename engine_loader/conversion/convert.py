"""``convert_checkpoint``: reads one kind of checkpoint and writes another, in bounded memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.filesystem import SerializationFormat

from ..errors import CheckpointError
from ..loading.checkpoint import Checkpoint
from ..loading.companions import companions_in, copy_companions
from ..loading.find import NoCheckpointError, ShardedState, TrainingCheckpoint, find_checkpoint, is_pytorch_file
from ..loading.mapping.named_layouts import misread_layout, rules_of
from ..loading.open_store import map_store, open_store
from ..loading.training.key_mapping import KeyMapping, make_renamer
from ..settings import load_settings
from ..sources.registry import is_remote, make_source
from ..sources.source import Source
from .dcp_output import write_dcp
from .destination import check_destination, unfinished_directory
from .output_check import check_output
from .pytorch_files import PyTorchFiles
from .safetensors_output import write_safetensors
from .written_tensors import Outgoing, Tensors, floating_point_type, outgoing

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5_000_000_000
"""As transformers has it."""
_CONFIG = "config.json"


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        files: the files with weights.
        tensors: how many tensors.
        nbytes: their bytes.
        left_out: what of a training checkpoint was left out, in a few words; "" for nothing.
    """

    files: list[Path]
    tensors: int
    nbytes: int
    left_out: str = ""


def convert_checkpoint(
    source: str,
    destination: str,
    *,
    to: Literal["safetensors", "dcp"] = "safetensors",
    items: Literal["torch_save", "safetensors"] = "torch_save",
    key_mapping: KeyMapping | None = None,
    optimizer_state: bool = False,
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
    **options: Any,
) -> Conversion:
    """Write a checkpoint as another kind, with the configuration and the tokenizer that lie beside it.

    Nothing appears under the destination's name before all is written. In memory are what is being read ahead (the
    setting ``buffer_bytes``) and the tensor that is being written.

    Args:
        source: a directory or a prefix (s3://…) with a training checkpoint or safetensors, one safetensors file, or a
            directory with PyTorch files (pytorch_model.bin), of which no code is run.
        destination: a directory, new or empty.
        to: "safetensors" (a Hugging Face checkpoint) or "dcp" (torch.distributed.checkpoint).
        items: how dcp stores tensors: as ``torch.save`` does, or in safetensors files.
        key_mapping: from the source's names to the new ones, see ``open_checkpoint``.
        optimizer_state: of a training checkpoint, also the tensors that are not the model's (optimizers, averaged
            copies, states of random generators), and to dcp all that is no tensor.
        dtype: of floating-point tensors of 16 bits and more, or its name ("bfloat16"); None: their own.
        max_shard_bytes: of a safetensors file.
        overwrite: replace a checkpoint that is there, at once where the file system can exchange names.
        progress: called with (bytes written, bytes in all).
        options: settings of the loader by name.

    Raises:
        CheckpointError: the source cannot be read or is no such checkpoint, or the destination cannot be written.
        SettingsError: an option is unknown or has a bad value, or ``dtype`` is not a floating-point type.
    """
    wanted = floating_point_type(dtype)
    check_destination(source, destination, overwrite=overwrite)
    settings = load_settings(options, extra_origin="the arguments of convert_checkpoint").settings.loader
    files = make_source(settings.backend, settings=settings)
    try:
        found = find_checkpoint(files, source, sharded_pattern=settings.sharded_pattern)
    except NoCheckpointError:
        if is_remote(source) or not any(map(is_pytorch_file, files.list(source))):
            raise
        if to == "dcp" or rules_of(key_mapping) is not None:
            raise CheckpointError(
                "PyTorch files are written as safetensors, at most under other names",
                file=source,
                hint="convert them, and then what was written",
            ) from None
        writing = _Writing(files, source, destination, wanted, max_shard_bytes, progress)
        pickled = PyTorchFiles(source)
        return writing.safetensors(pickled, outgoing(pickled, make_renamer(key_mapping), wanted))
    if isinstance(found, ShardedState):
        raise CheckpointError(
            "this is a sharded_state checkpoint: an engine's own tensors, fused and cut for one parallel layout, which "
            "only that engine can take apart",
            file=source,
            hint="convert the checkpoint that it was made from",
        )
    # The names of a training are mapped as it is opened, so that its own names tell optimizers from models.
    at_once, later = (key_mapping, None) if isinstance(found, TrainingCheckpoint) else (None, key_mapping)
    store = open_store(files, found, settings, key_mapping=at_once, optimizer_state=optimizer_state)
    if later is not None and rules_of(later) is not None:
        to_training = to == "dcp" and not store.key_mapping_applies
        store = map_store(store, files, found.directory, later, inverse=to_training)
        later = None
    with Checkpoint(store, torch.device("cpu")) as checkpoint:
        tensors = outgoing(checkpoint, make_renamer(later), wanted)
        warning = misread_layout((tensor.name, tensor.info.name) for tensor in tensors) if later else None
        if warning is not None:
            logger.warning("%s", warning)
        if not tensors:
            raise CheckpointError("there are no tensors to convert", file=source)
        writing = _Writing(files, found.directory, destination, wanted, max_shard_bytes, progress)
        if to == "safetensors":
            return writing.safetensors(checkpoint, tensors, store.left_out)
        kind = SerializationFormat.SAFETENSORS if items == "safetensors" else SerializationFormat.TORCH_SAVE
        others = store.other_items() if optimizer_state else {}
        with writing.directory(tensors) as (unfinished, written):
            write_dcp(
                unfinished, checkpoint, tensors, items=kind, others=others, paths=store.state_paths(), written=written
            )
        return writing.conversion(tensors, store.left_out)


@dataclass
class _Writing:
    """A directory that is written: the tensors, and what lies beside them in the source."""

    source: Source
    beside: str | None
    destination: str
    dtype: torch.dtype | None
    max_shard_bytes: int
    progress: Callable[[int, int], object]
    weights: Sequence[str] = ()

    def safetensors(self, tensors: Tensors, going: Sequence[Outgoing], left_out: str = "") -> Conversion:
        """Write a Hugging Face checkpoint."""
        with self.directory(going) as (unfinished, written):
            write_safetensors(unfinished, tensors, going, max_shard_bytes=self.max_shard_bytes, written=written)
        return self.conversion(going, left_out)

    @contextmanager
    def directory(self, going: Sequence[Outgoing]) -> Iterator[tuple[Path, Callable[[int], None]]]:
        """A directory for the weights, and a function to call with the bytes that were written.

        When the block ends, it is checked, completed, and put in its place.
        """
        total = sum(tensor.nbytes for tensor in going)
        companions = [] if self.beside is None else companions_in(self.source, self.beside)
        done = 0

        def written(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            self.progress(done, total)

        self.progress(0, total)
        needed = total + sum(companion.nbytes for companion in companions)
        with unfinished_directory(self.destination, needed) as unfinished:
            yield unfinished, written
            check_output(unfinished, going)
            self.weights = sorted(
                path.name for path in unfinished.iterdir() if path.suffix in (".safetensors", ".distcp")
            )
            if self.beside is not None:
                copy_companions(self.source, self.beside, companions, unfinished)
            _set_dtype(unfinished / _CONFIG, self.dtype)

    def conversion(self, going: Sequence[Outgoing], left_out: str) -> Conversion:
        """What was written."""
        files = [Path(self.destination) / name for name in self.weights]
        return Conversion(files, len(going), sum(tensor.nbytes for tensor in going), left_out)


def _set_dtype(config: Path, dtype: torch.dtype | None) -> None:
    """An engine takes the type that it serves from the model's configuration."""
    if dtype is None or not config.exists():
        return
    try:
        content = json.loads(config.read_text())
    except ValueError as error:
        raise CheckpointError(f"this is not valid JSON: {error}", file=config) from None
    known = [key for key in ("torch_dtype", "dtype") if isinstance(content, dict) and key in content]
    if known:
        content |= dict.fromkeys(known, str(dtype).removeprefix("torch."))
        config.write_text(json.dumps(content, indent=2) + "\n")
