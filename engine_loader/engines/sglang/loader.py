"""SGLang: the loader class behind ``--load-format b10_3fs``.

It is SGLang's own DefaultModelLoader, told that the format is "safetensors", with the iterators over safetensors files
exchanged. So whatever the default loader does around the reading (download, revisions, the choice of files by the
index, secondary weights and prefixes, multi-token-prediction layers of drafts, work after loading) stays the engine's,
in every version. Read in SGLang 0.5.9 to 0.5.23.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.configs.load_config import LoadConfig, LoadFormat
from sglang.srt.model_loader import loader as sglang_loader
from sglang.srt.model_loader.loader import DefaultModelLoader

from ...errors import CheckpointError
from ...formats.sharded_state import ShardRank
from ...loading.direct.load import DirectLoad
from ...loading.find import TrainingCheckpoint
from ...loading.weights import check_weights
from ...settings import load_settings
from ..common.adapter import Weights, plan_mode, prepare_memory, read_weights, split_options
from ..common.hooks import wrap
from ..common.names import told_of_misfits
from ..common.sharded import files_of_rank, fill_state
from ..common.weights_uri import training_checkpoint_at, weights_at
from .format import bypassed, refuse_quantization

logger = logging.getLogger(__name__)

_ITERATORS = ("buffered_multi_thread_safetensors_weights_iterator", "safetensors_weights_iterator")
_exchange = threading.RLock()


@dataclass
class _FirstLoad:
    """What this process loaded first: update_weights_from_disk tells its loader neither options nor what is served.

    Attributes:
        options: of --model-loader-extra-config.
        model: the model that is served, as its path was given.
    """

    options: dict[str, Any] = field(default_factory=dict)
    model: str | None = None


_first = _FirstLoad()


def register() -> None:
    """Let SGLang's other loaders stand a load format that is ours."""

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
        options = load_config.model_loader_extra_config or _first.options
        own, _ = split_options(options, engine="SGLang", refused=("enable_multithread_load", "num_threads"))
        self._reader_settings = load_settings(own).settings.loader
        _first.options = own
        super().__init__(_masked(load_config))
        self._starting = False
        self._shards: list[str] | None = None
        self._model_config: Any = None
        self._direct: DirectLoad | None = None
        self._note: str | None = None
        self._device: torch.device | None = None

    def load_model(self, *, model_config: Any, device_config: Any) -> torch.nn.Module:
        """The model with its weights.

        Raises:
            SettingsError: SGLang would quantise the model while it loads it, past this loader.
        """
        _refuse(model_config)
        _first.model = _first.model or model_config.model_path
        self._shards = files_of_rank(self._directory_of(model_config), self._reader_settings, _place)
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
                place = self._directory_of(self._model_config)
                stack.enter_context(told_of_misfits(model, place, self._reader_settings))
            if directly:
                stack.enter_context(self._loading_directly(model))
            DefaultModelLoader.load_weights_and_postprocess(model, weights, target_device)

    def _fill_state(self, model: Any, target_device: Any) -> None:
        """As SGLang's ShardedStateLoader: the state of such a checkpoint is one that is prepared for its kernels."""
        assert self._shards is not None
        with _without_loading(model):
            DefaultModelLoader.load_weights_and_postprocess(model, iter(()), target_device)
        state = sglang_loader.ShardedStateLoader._filter_subtensors(model.state_dict())
        directory = os.path.dirname(self._shards[0])
        hint = "it was saved from another model, layout, or version of SGLang: save it again (docs/sglang.md)"
        with torch.no_grad():
            fill_state(state, self._read(self._shards), directory, hint=hint, log=logger)
        after = sglang_loader.post_load_weights
        after(*(model, self._model_config)[: len(inspect.signature(after).parameters)])  # older versions take both

    @contextmanager
    def _loading_directly(self, model: Any) -> Iterator[None]:
        """Within, the model's ``load_weights`` is in direct mode; what SGLang does behind it is not."""
        original = model.load_weights

        def load_weights(*args: Any, **options: Any) -> Any:
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

        model.load_weights = load_weights
        try:
            yield
        finally:
            del model.load_weights

    def _get_weights_iterator(self, source: Any, **options: Any) -> Weights:
        if not self._starting and files_of_rank(source.model_or_path, self._reader_settings, _place) is not None:
            raise CheckpointError(
                "weights in place are taken from an original checkpoint, and this is a sharded_state one",
                file=source.model_or_path,
                hint="start a server with it instead",
            )
        uri = self._reader_settings.weights_uri
        if uri is not None and source.model_or_path == _first.model:
            return self._weights_at(source, uri.rstrip("/"))
        if training_checkpoint_at(source.model_or_path, self._reader_settings):
            return self._weights_at(source, source.model_or_path)
        with _exchange:
            originals = {name: getattr(sglang_loader, name) for name in _ITERATORS}
            for name in _ITERATORS:
                setattr(sglang_loader, name, self._weights)
            try:
                return super()._get_weights_iterator(source, **options)  # type: ignore[no-any-return]
            finally:
                for name, original in originals.items():
                    setattr(sglang_loader, name, original)

    def _weights_at(self, source: Any, uri: str) -> Weights:
        """What SGLang's own method gives for a source, read from ``uri``."""
        patterns = getattr(source, "allow_patterns_overrides", None)  # of newer versions
        weights = self._weights(weights_at(uri, self._reader_settings, patterns=patterns))
        if self.load_config.draft_model_idx is not None:
            filtered = self._filter_mtp_weights(weights, source.prefix, self.load_config.draft_model_idx)
            return filtered  # type: ignore[no-any-return]
        return ((source.prefix + name, tensor) for name, tensor in weights)

    def _weights(self, weights: list[str] | TrainingCheckpoint, *_args: Any, **_options: Any) -> Weights:
        """What stands in for SGLang's iterators. (Their arguments say how to read; that is for our settings.)"""
        if not self._starting:
            # What is wrong with new weights shall be found before the old ones are touched: to roll back, SGLang would
            # read the new ones again.
            check_weights(weights, self._reader_settings)
        return self._read(weights)

    def _read(self, weights: list[str] | TrainingCheckpoint) -> Weights:
        # A generator: only when it begins is it known whether the load is in direct mode.
        yield from read_weights(
            weights, self._reader_settings, log=logger, note=self._note, direct=self._direct, device=self._device
        )


@contextmanager
def _without_loading(model: Any) -> Iterator[None]:
    """Within, the model takes no weights."""
    model.load_weights = lambda *_args, **_options: None
    try:
        yield
    finally:
        del model.load_weights


def _place() -> tuple[ShardRank, int]:
    """Which rank of how many this is. (SGLang's layout has no place for pipeline stages.)"""
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
    masked.load_format = LoadFormat.SAFETENSORS
    masked.model_loader_extra_config = {}
    return masked


def _refuse(model_config: Any) -> None:
    """Refuse what SGLang has a loader of its own for, which would read the weights in its own way.

    Raises:
        SettingsError: it is so.
    """
    refuse_quantization(model_config)
    quantization = getattr(model_config, "quantization", None)
    modelopt = ("modelopt", "modelopt_fp8", "modelopt_fp4", "modelopt_mixed")
    if quantization in modelopt and not model_config._is_already_quantized():
        raise bypassed("quantises the model by ModelOpt while it loads it")
