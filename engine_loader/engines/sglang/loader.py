"""SGLang: the loader class behind ``--load-format b10_3fs``.

The class extends SGLang's DefaultModelLoader, gives it one of its own formats (masks.py), and replaces the iterators
over safetensors files while they are called. Whatever the default loader does around the reading (download, revisions,
the choice of files by the index, secondary weights and prefixes, multi-token-prediction layers of drafts, work after
loading) stays SGLang's, in every version. Read in SGLang 0.5.9 to 0.5.23.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sglang.srt.configs.load_config import LoadConfig, LoadFormat
from sglang.srt.model_loader import loader as sglang_loader
from sglang.srt.model_loader.loader import DefaultModelLoader

from ...errors import CheckpointError
from ...formats.sharded_state import ShardRank
from ...loading.devices.per_tensor import TargetDevice
from ...loading.direct.load import DirectLoad
from ...loading.find import TrainingCheckpoint
from ...loading.weights import check_weights
from ...replacing import wrap, wrapped_in_thread
from ...settings import LoaderSettings
from ...sources.registry import make_source
from ..common.mode import plan_mode
from ..common.names import explaining_misfits
from ..common.reading import Weights, prepare_memory, read_weights
from ..common.sharded import files_of_rank, fill_state, refuse_in_place
from ..common.weights_uri import training_checkpoint_at, weights_at
from .masks import mask_of, patterns_of
from .node_ranks import node_ranks
from .options import settings_of
from .refusals import bypassed, refuse_model

logger = logging.getLogger(__name__)

_NEXT_TOKEN_LAYERS, _INDEX = "mtp.safetensors", "model.safetensors.index.json"
_ITERATORS = ("buffered_multi_thread_safetensors_weights_iterator", "safetensors_weights_iterator")


@dataclass
class _FirstLoad:
    """What this process loaded first: update_weights_from_disk gives its loader neither options nor the served model.

    Attributes:
        options: this package's keys of --model-loader-extra-config.
        model: path of the model that is served, as it was given.
    """

    options: dict[str, Any] = field(default_factory=dict)
    model: str | None = None


_first = _FirstLoad()


def register() -> None:
    """Have SGLang's own loaders accept a LoadConfig whose format is this loader class, or refuse it with what to do."""

    def around(original: Any, self: Any, load_config: Any, *args: Any, **options: Any) -> None:
        if load_config.load_format is B10ModelLoader:
            if type(self) is not DefaultModelLoader:
                raise bypassed(f"loads such models by its own {type(self).__name__}")
            load_config = _masked(load_config)  # for reading what lies beside the model: a LoRA adapter, an embedding
        original(self, load_config, *args, **options)

    wrap(DefaultModelLoader, "__init__", around)


class B10ModelLoader(DefaultModelLoader):
    """Loads safetensors weights by this package's reader.

    Raises:
        SettingsError: --model-loader-extra-config has an unknown key or a bad value.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        self._reader_settings, _first.options = settings_of(load_config.model_loader_extra_config or _first.options)
        super().__init__(_masked(load_config))
        self._starting = False
        self._shards: list[str] | None = None
        self._model_config: Any = None
        self._direct: DirectLoad | None = None
        self._note: str | None = None
        self._device: TargetDevice = None

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        """The model with its weights.

        Raises:
            SettingsError: SGLang would quantise the model while it loads it, past this loader.
        """
        refuse_model(model_config)
        _first.model = _first.model or model_config.model_path
        self._shards = _files_of_rank(self._directory_of(model_config), self._reader_settings)
        self._model_config = model_config
        self._starting = True
        try:
            model: torch.nn.Module = super().load_model(model_config=model_config, device_config=device_config)
            return model
        finally:
            self._starting = False

    def _directory_of(self, model_config: Any) -> str:
        uri = self._reader_settings.weights_uri
        return str(uri if uri is not None and model_config.model_path == _first.model else model_config.model_path)

    def load_weights_and_postprocess(self, model: torch.nn.Module, weights: Weights, target_device: Any) -> None:
        """Load into an initialised model, in direct mode where that can serve, and prepare it for its kernels.

        Raises:
            SettingsError: direct mode was asked for and cannot serve.
        """
        prepare_memory(model)
        directly, self._note, self._device = plan_mode(self._reader_settings, model)
        if self._shards is not None:
            self._fill_state(model, target_device)
            return
        with ExitStack() as stack:
            if self._starting:  # SGLang does not say what an update is
                directory = self._directory_of(self._model_config)
                stack.enter_context(explaining_misfits(model, directory, self._reader_settings))
            if directly:
                stack.enter_context(self._loading_directly(model))
            DefaultModelLoader.load_weights_and_postprocess(model, weights, target_device)

    def _fill_state(self, model: Any, target_device: Any) -> None:
        """Load a sharded_state checkpoint as SGLang's ShardedStateLoader: its tensors are prepared for the kernels, so
        the model is prepared first and filled then.
        """
        assert self._shards is not None
        with wrapped_in_thread(model, "load_weights", _take_no_weights):
            DefaultModelLoader.load_weights_and_postprocess(model, iter(()), target_device)
        state = sglang_loader.ShardedStateLoader._filter_subtensors(model.state_dict())
        directory = os.path.dirname(self._shards[0])
        hint = "it was saved from another model, layout, or version of SGLang: save it again (docs/sglang.md)"
        with torch.no_grad():
            fill_state(state, self._read(self._shards), directory, hint=hint, log=logger)
        # Its name began with an underscore from 0.5.15 to 0.5.19.
        after = getattr(sglang_loader, "post_load_weights", None) or sglang_loader._post_load_weights
        after(*(model, self._model_config)[: len(inspect.signature(after).parameters)])  # older versions take both

    @contextmanager
    def _loading_directly(self, model: Any) -> Iterator[None]:
        """While the block runs, the model's ``load_weights`` is in direct mode; what SGLang does behind it is not."""

        def load_weights(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
            load = DirectLoad(model)
            with load as self._direct:
                try:
                    result = original(*args, **options)
                finally:
                    self._direct = None
            if self._starting and load.took_nothing:
                # SGLang logs each name that it does not know, and would serve whatever was in memory.
                raise ValueError("SGLang took none of the weights: their names are not the model's")
            return result

        with wrapped_in_thread(model, "load_weights", load_weights):
            yield

    def _get_weights_iterator(self, source: Any, **options: Any) -> Weights:
        uri = self._reader_settings.weights_uri
        replaced = uri.rstrip("/") if uri is not None and source.model_or_path == _first.model else None
        if not self._starting:
            refuse_in_place(replaced or source.model_or_path, self._reader_settings)
        mask = mask_of(source.model_or_path, self._names(source.model_or_path, replaced))
        self.load_config.load_format = getattr(LoadFormat, mask.upper(), LoadFormat.AUTO)
        if replaced is not None:
            return self._weights_at(source, replaced, mask)
        if training_checkpoint_at(source.model_or_path, self._reader_settings):
            return self._weights_at(source, source.model_or_path, mask)
        with ExitStack() as stack:
            for name in _ITERATORS:
                stack.enter_context(wrapped_in_thread(sglang_loader, name, self._iterate))
            return super()._get_weights_iterator(source, **options)  # type: ignore[no-any-return]

    def _names(self, model: str, replaced: str | None) -> Iterator[str]:
        """Names of the files of a model, and of its weights where they lie elsewhere."""
        for directory in filter(None, (model, replaced)):
            source = make_source(self._reader_settings.backend, settings=self._reader_settings)
            if source.is_dir(directory):  # else a file, or the name of a model on the hub
                yield from source.list(directory)

    def _weights_at(self, source: Any, uri: str, mask: str) -> Weights:
        """What SGLang's ``_get_weights_iterator`` returns for a source, but with the weights at ``uri``."""
        patterns = patterns_of(mask, getattr(source, "allow_patterns_overrides", None))  # of newer versions
        found = weights_at(uri, self._reader_settings, patterns=patterns)
        if isinstance(found, list) and getattr(source, "model_config", None) is not None:
            found = _with_next_token_layers(found, uri, source.model_config, self._reader_settings)
        weights = self._weights(found)
        if self.load_config.draft_model_idx is not None:
            filtered = self._filter_mtp_weights(weights, source.prefix, self.load_config.draft_model_idx)
            return filtered  # type: ignore[no-any-return]
        return ((source.prefix + name, tensor) for name, tensor in weights)

    def _iterate(self, _original: Callable[..., Weights], files: list[str], *_args: Any, **_options: Any) -> Weights:
        """Called instead of SGLang's iterators, whose other arguments say how to read: here the settings do."""
        return self._weights(files)

    def _weights(self, weights: list[str] | TrainingCheckpoint) -> Weights:
        """(name, tensor) of safetensors files, or of a training checkpoint."""
        if not self._starting:
            # Faults of new weights are found before the old ones are touched: to roll back, SGLang would read the new
            # ones again.
            check_weights(weights, self._reader_settings)
        return self._read(weights)

    def _read(self, weights: list[str] | TrainingCheckpoint) -> Weights:
        # A generator: only when it begins is it known whether the load is in direct mode.
        yield from read_weights(
            weights,
            self._reader_settings,
            log=logger,
            note=self._note,
            direct=self._direct,
            device=self._device,
            ranks=None if self._direct is None else node_ranks(self._reader_settings),
        )


def _with_next_token_layers(files: list[str], uri: str, model_config: Any, settings: LoaderSettings) -> list[str]:
    """``files``, and that of multi-token prediction where SGLang adds it to those of the index.

    SGLang looks for it in a directory: it is asked with one that has a file of this name if there is one at ``uri``.
    """
    add = getattr(sglang_loader, "maybe_add_mtp_safetensors", None)
    source = make_source(settings.backend, settings=settings)
    beside = os.path.join(uri, _NEXT_TOKEN_LAYERS)
    if add is None or beside in files or not source.is_dir(uri) or _NEXT_TOKEN_LAYERS not in source.list(uri):
        return files
    with tempfile.TemporaryDirectory() as directory:
        stand_in = Path(directory, _NEXT_TOKEN_LAYERS)
        stand_in.touch()
        added = add([], directory, _INDEX, model_config.hf_config)
    return [*files, beside] if added else files


def _take_no_weights(*_args: Any, **_options: Any) -> None:
    """Called instead of a model's ``load_weights`` while SGLang only prepares the model for its kernels."""


def _files_of_rank(directory: str, settings: LoaderSettings) -> list[str] | None:
    return files_of_rank(directory, settings, _rank_of_process)


def _rank_of_process() -> tuple[ShardRank, int]:
    """This process's rank, and the number of ranks, in SGLang's layout of sharded_state checkpoints.

    Raises:
        CheckpointError: SGLang runs with pipeline parallelism, which that layout has no names for.
    """
    from sglang.srt.distributed.parallel_state import get_pp_group, get_tp_group

    if get_pp_group().world_size > 1:
        raise CheckpointError(
            "a sharded_state checkpoint is asked for with pipeline parallelism",
            hint="SGLang's layout has none: serve the original checkpoint, or use tensor parallelism alone",
        )
    ranks = get_tp_group()
    return ShardRank(0, ranks.rank_in_group), ranks.world_size


def _masked(load_config: Any) -> Any:
    """The configuration as SGLang's own loader understands it."""
    masked = copy.copy(load_config)
    masked.load_format = LoadFormat.AUTO
    masked.model_loader_extra_config = {}
    return masked
