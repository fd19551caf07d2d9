"""vLLM: the loader class behind ``--load-format b10_3fs``.

The class extends vLLM's DefaultModelLoader, gives it one of its own formats (masks.py), and replaces the iterator over
safetensors files while it is called. Whatever the default loader does around the reading (download, revisions, ignore
patterns, secondary weights and prefixes, filters, weight tracking, reloading) stays vLLM's, in every version. Read in
vLLM 0.10.1 to 0.33.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import LoadConfig
from vllm.model_executor.model_loader import default_loader, register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ...errors import CheckpointError, SettingsError
from ...loading.devices.per_tensor import TargetDevice
from ...loading.direct.dry_run import Explanation
from ...loading.direct.load import DirectLoad
from ...loading.find import TrainingCheckpoint
from ...plugin import LOAD_FORMAT
from ...replacing import wrapped_in_thread
from ...sources.registry import is_remote
from ..common.mode import obstacle_to_direct, plan_mode
from ..common.names import explaining_misfits
from ..common.reading import Weights, prepare_memory, read_weights
from ..common.sharded import refuse_in_place
from ..common.weights_uri import has_weights, training_checkpoint_at, weights_at
from .headers import WeightHeaders, answering
from .masks import mask_of, patterns_of
from .node_ranks import node_ranks
from .options import settings_of
from .sharded import files_of_this_rank, fill_state, tie_as_saved

# Below vLLM's own logger, so that it is shown in vLLM's way and at vLLM's level.
logger = logging.getLogger("vllm.engine_loader")

_ITERATOR = "safetensors_weights_iterator"
_TORCHAO = "torchao"
_LOADED_FOR = "_engine_loader_loaded_for"
"""Attribute of a model: ``model_config.model`` at its first load, the one path that ``weights_uri`` replaces."""


def register() -> None:
    """Register the loader class; a second call does nothing."""
    from vllm.model_executor import model_loader

    if getattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", {}).get(LOAD_FORMAT) is not B10ModelLoader:
        register_model_loader(LOAD_FORMAT)(B10ModelLoader)
    _show_warnings()


class B10ModelLoader(DefaultModelLoader):
    """Loads safetensors weights by this package's reader.

    Raises:
        SettingsError: --model-loader-extra-config has an unknown key or a bad value.
    """

    counter_before_loading_weights: float

    def __init__(self, load_config: LoadConfig) -> None:
        self._reader_settings, engine = settings_of(load_config.model_loader_extra_config)
        masked = copy.copy(load_config)
        masked.load_format = "safetensors"
        masked.model_loader_extra_config = engine
        super().__init__(masked)
        self._given = load_config
        self._uri_of: str | None = None
        self._direct: DirectLoad | None = None
        self.last_load: DirectLoad | None = None
        self._note: str | None = None
        self._device: TargetDevice = None
        self._replaced: tuple[str, str] | None = None
        self._in_load_weights = False

    def download_model(self, model_config: Any) -> None:
        """Download a hub model's weights, unless others are loaded in their place (the setting ``weights_uri``)."""
        self.load_config.load_format = mask_of(model_config)
        own = self._replacement(model_config) is None
        if own and not training_checkpoint_at(model_config.model, self._reader_settings):
            super().download_model(model_config)

    def create_model(self, vllm_config: Any, model_config: Any, *args: Any, **options: Any) -> torch.nn.Module:
        """Build the model. Where a model is made of others, vLLM makes configurations for them here, and asks for
        headers again.
        """
        self._uri_of = _model_of_uri(vllm_config, model_config, self._given)
        settings = self._reader_settings
        if self._replacement(model_config) is None:
            settings = settings.model_copy(update={"weights_uri": None})
        with answering(WeightHeaders(model_config.model, settings)):
            return super().create_model(vllm_config, model_config, *args, **options)  # type: ignore[no-any-return]

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        """Load into an initialised model, in direct mode where that can serve.

        Raises:
            SettingsError: direct mode was asked for and cannot serve.
        """
        prepare_memory(model)
        directly, self._note, self._device = plan_mode(self._reader_settings, model)
        if not directly:
            self._fill(model, model_config)
            return
        self._load_directly(model, model_config, DirectLoad(model, expects=_expects(model)))

    def _fill(self, model: torch.nn.Module, model_config: Any) -> None:
        """Fill the model: by vLLM's ``load_weights``, or by its state dict if the checkpoint is a sharded_state one."""
        if not hasattr(model, _LOADED_FOR):
            setattr(model, _LOADED_FOR, model_config.model)
        replaced = self._replacement(model_config, model)
        directory = replaced[1] if replaced else getattr(model_config, "model_weights", None) or model_config.model
        files = files_of_this_rank(directory, self._reader_settings)
        if files is None:
            self._in_load_weights = True
            try:
                with explaining_misfits(model, directory, self._reader_settings):
                    super().load_weights(model, model_config)
            finally:
                self._in_load_weights = False
            return
        tie_as_saved(model, model_config, files, self._reader_settings)
        weights = self._read(files, show_progress=self.load_config.use_tqdm_on_load)
        with torch.no_grad():
            fill_state(model, weights, directory)

    def explain(self, model: torch.nn.Module, model_config: Any) -> Explanation:
        """Find out what ``load_weights`` would read of each tensor in direct mode, without filling the model."""
        explanation = Explanation(self._reader_settings)
        explanation.obstacle = obstacle_to_direct(model, self._reader_settings)
        load = DirectLoad(model, expects=_expects(model), observer=explanation, execute=False)
        self._load_directly(model, model_config, load)
        return explanation

    def _load_directly(self, model: torch.nn.Module, model_config: Any, load: DirectLoad) -> None:
        self.last_load = load
        with load as self._direct:
            try:
                self._fill(model, model_config)
            finally:
                self._direct = None

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Weights:
        """(name, tensor) of all the model's weights.

        vLLM's ``reload_weights`` calls this on a new loader, without ``load_weights``, after it has set
        ``model_config.model`` to the path of the new weights, if it was given one.

        Raises:
            CheckpointError: in a reload, the weights are missing or damaged; the model has not been touched then.
        """
        self.load_config.load_format = mask_of(model_config)
        self._replaced = self._replacement(model_config, model)
        weights: Weights = super().get_all_weights(model_config, model)
        return weights if self._in_load_weights else self._reloaded(weights, model_config, model)

    def _reloaded(self, weights: Weights, model_config: Any, model: torch.nn.Module) -> Weights:
        """``weights`` for a model that serves, handed over where a first load would hand them over."""
        path = self._replaced[1] if self._replaced else model_config.model
        if os.path.isabs(path) and not os.path.exists(path):
            raise CheckpointError("there is nothing to reload weights from", file=path, hint="check the path")
        refuse_in_place(path, self._reader_settings)
        # Not in direct mode: vLLM processes each layer as soon as it has its tensors, and needs their data then.
        streamed = self._reader_settings.model_copy(update={"mode": "stream"})
        _, self._note, self._device = plan_mode(streamed, model)
        # The first tensor comes when all files are open and checked: vLLM takes the model apart behind this.
        return itertools.chain(list(itertools.islice(weights, 1)), weights)

    def _replacement(self, model_config: Any, model: torch.nn.Module | None = None) -> tuple[str, str] | None:
        """The model's directory, and the ``weights_uri`` that its weights are read from instead; else None."""
        if is_remote(model_config.model):  # in a reload: vLLM starts with a directory or the name of a hub model
            return model_config.model, model_config.model.rstrip("/")
        uri = self._reader_settings.weights_uri
        drafts = getattr(model_config, "runner_type", None) == "draft" and model_config.model != self._uri_of
        if uri is None or (drafts and has_weights(model_config.model)):
            return None  # a draft model is another model, unless its weights are among those of the one that it serves
        if model is not None and _started_with(model, model_config) != model_config.model:
            return None  # reload_weights was given other weights
        return model_config.model, uri.rstrip("/")

    def _get_weights_iterator(self, source: Any) -> Weights:
        if self._replaced is not None and source.model_or_path == self._replaced[0]:
            return self._weights_at(source, self._replaced[1])
        if training_checkpoint_at(source.model_or_path, self._reader_settings):
            return self._weights_at(source, source.model_or_path)
        with wrapped_in_thread(default_loader, _ITERATOR, self._weights):
            return super()._get_weights_iterator(source)  # type: ignore[no-any-return]

    def _weights_at(self, source: Any, uri: str) -> Weights:
        """What vLLM's ``_get_weights_iterator`` returns for a source, but with the weights at ``uri``."""
        # Both attributes are of newer versions.
        subfolder, patterns = getattr(source, "subfolder", None), getattr(source, "allow_patterns_overrides", None)
        patterns = patterns_of(self.load_config.load_format, patterns)
        files = weights_at(uri, self._reader_settings, subfolder=subfolder, patterns=patterns)
        if not self.counter_before_loading_weights:
            self.counter_before_loading_weights = time.perf_counter()
        show_progress = self.load_config.use_tqdm_on_load
        if getattr(self.load_config, "safetensors_load_strategy", None) == _TORCHAO:
            weights = _by_vllms_reader(files, uri, show_progress)
        else:
            skip = _skip_experts(getattr(self, "local_expert_ids", None))
            weights = self._read(files, show_progress=show_progress, skip=skip)
        return ((source.prefix + name, tensor) for name, tensor in weights)

    def _weights(
        self,
        original: Callable[..., Weights],
        files: list[str] | TrainingCheckpoint,
        use_tqdm_on_load: bool,
        strategy: str | None = None,
        *args: Any,
        local_expert_ids: set[int] | None = None,
        **options: Any,
    ) -> Weights:
        """Called instead of vLLM's iterator over safetensors files (``original``), with its arguments."""
        if strategy == _TORCHAO:
            # These files hold flattened tensor subclasses that only vLLM's iterator puts together again.
            logger.warning("%s: torchao checkpoints are read by vLLM's own reader", LOAD_FORMAT)
            return original(files, use_tqdm_on_load, strategy, *args, local_expert_ids=local_expert_ids, **options)
        return self._read(files, show_progress=use_tqdm_on_load, skip=_skip_experts(local_expert_ids))

    def _read(
        self, weights: list[str] | TrainingCheckpoint, *, show_progress: bool, skip: Callable[[str], bool] | None = None
    ) -> Weights:
        return read_weights(
            weights,
            self._reader_settings,
            log=logger,
            show_progress=show_progress,
            skip=skip,
            note=self._note,
            direct=self._direct,
            device=self._device,
            ranks=None if self._direct is None else node_ranks(self._reader_settings),
        )


def _by_vllms_reader(weights: list[str] | TrainingCheckpoint, uri: str, show_progress: bool) -> Weights:
    """The tensors of a torchao checkpoint, whose files hold flattened subclasses that vLLM puts together again.

    Raises:
        SettingsError: vLLM's reader cannot read there.
    """
    if isinstance(weights, TrainingCheckpoint) or is_remote(uri):
        raise SettingsError(
            f"weights_uri: {uri} has a torchao checkpoint, whose tensors only vLLM's own reader puts together, and it "
            "reads files of mounted file systems only; copy it to one, and name that directory"
        )
    logger.warning("%s: torchao checkpoints are read by vLLM's own reader", LOAD_FORMAT)
    return default_loader.safetensors_weights_iterator(weights, show_progress, _TORCHAO)  # type: ignore[no-any-return]


def _model_of_uri(vllm_config: Any, model_config: Any, load_config: LoadConfig) -> str:
    """The model whose weights lie at ``weights_uri``: the one that is served (a draft may be a part of it), or a draft
    that has a load configuration of its own in which the setting is.
    """
    own = getattr(getattr(vllm_config, "speculative_config", None), "draft_load_config", None)
    if own is load_config and own is not vllm_config.load_config and "weights_uri" in own.model_loader_extra_config:
        return str(model_config.model)
    return str(vllm_config.model_config.model)


def _started_with(model: torch.nn.Module, model_config: Any) -> str:
    """``model_config.model`` as it was before any reload. Its configuration tells, if another loader loaded it first
    (vLLM can start with --load-format dummy, and reload).
    """
    configured = getattr(getattr(model_config, "hf_config", None), "_name_or_path", None)
    return str(getattr(model, _LOADED_FOR, None) or configured or model_config.model)


def _expects(model: torch.nn.Module) -> Callable[[str], bool]:
    """A function that is false for the checkpoint's name of a tensor whose layer belongs to another pipeline stage."""
    from vllm.model_executor.models import utils

    # Not by its is_pp_missing_parameter, which remembers models by their ids, also when they are gone.
    kinds = tuple(getattr(utils, kind) for kind in ("PPMissingLayer", "StageMissingLayer") if hasattr(utils, kind))
    missing = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, kinds))
    return lambda name: not name.startswith(missing)


def _skip_experts(local_expert_ids: set[int] | None) -> Callable[[str], bool] | None:
    if local_expert_ids is None:
        return None
    from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

    return functools.partial(should_skip_weight, local_expert_ids=local_expert_ids)


def _show_warnings() -> None:
    """Give this package's logger the handlers and level of vLLM's: vLLM sets up only its own logger."""
    ours, theirs = logging.getLogger("engine_loader"), logging.getLogger("vllm")
    if not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
