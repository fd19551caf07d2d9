"""vLLM: the loader class behind ``--load-format b10_3fs``.

It is vLLM's own DefaultModelLoader, told that the format is "safetensors", with one thing exchanged: the iterator over
safetensors files. So whatever the default loader does around the reading (download, revisions, ignore patterns,
secondary weights and prefixes, filters, weight tracking, reloading) stays the engine's, in every version. Read in vLLM
0.10.1 to 0.32.
"""

from __future__ import annotations

import copy
import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import default_loader, register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ...loading.direct.dry_run import Explanation
from ...loading.direct.load import DirectLoad
from ...loading.find import TrainingCheckpoint
from ...plugin import LOAD_FORMAT
from ...settings import load_settings
from ..common.adapter import Weights, obstacle_to_direct, plan_mode, prepare_memory, read_weights, split_options
from ..common.names import told_of_misfits
from ..common.weights_uri import has_weights, training_checkpoint_at, weights_at
from .sharded import files_of_this_rank, fill_state, tie_as_saved

# Below vLLM's own logger, so that it is shown in vLLM's way and at vLLM's level.
logger = logging.getLogger("vllm.engine_loader")

_ENGINE_KEYS = frozenset({"enable_weights_track"})
"""Keys of --model-loader-extra-config that vLLM's default loader takes and that mean something with this reader."""
_ITERATOR = "safetensors_weights_iterator"
_exchange = threading.RLock()


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
        own, engine = split_options(
            load_config.model_loader_extra_config,
            engine="vLLM",
            kept=_ENGINE_KEYS,
            refused=("enable_multithread_load", "num_threads"),
        )
        self._reader_settings = load_settings(own).settings.loader
        masked = copy.copy(load_config)
        masked.load_format = "safetensors"
        masked.model_loader_extra_config = engine
        super().__init__(masked)
        self._direct: DirectLoad | None = None
        self.last_load: DirectLoad | None = None
        self._note: str | None = None
        self._device: torch.device | None = None
        self._replaced: tuple[str, str] | None = None

    def download_model(self, model_config: Any) -> None:
        """Fetch a hub model's weights, where they are what will be loaded."""
        here = self._replacement(model_config) is None
        if here and not training_checkpoint_at(model_config.model, self._reader_settings):
            super().download_model(model_config)

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
        """Have the engine's code put the weights into the model."""
        replaced = self._replacement(model_config)
        directory = replaced[1] if replaced else getattr(model_config, "model_weights", None) or model_config.model
        files = files_of_this_rank(directory, self._reader_settings)
        if files is None:
            with told_of_misfits(model, directory, self._reader_settings):
                super().load_weights(model, model_config)
            return
        tie_as_saved(model, model_config, files, self._reader_settings)
        weights = self._weights(default_loader.safetensors_weights_iterator)(files, self.load_config.use_tqdm_on_load)
        with torch.no_grad():
            fill_state(model, weights, directory)

    def explain(self, model: torch.nn.Module, model_config: Any) -> Explanation:
        """What ``load_weights`` would read of which tensor, in direct mode. The model is not filled."""
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
        self._replaced = self._replacement(model_config)
        return super().get_all_weights(model_config, model)  # type: ignore[no-any-return]

    def _replacement(self, model_config: Any) -> tuple[str, str] | None:
        """The model's directory, and the weights_uri from which its weights come instead, if so."""
        uri = self._reader_settings.weights_uri
        if uri is None or (getattr(model_config, "runner_type", None) == "draft" and has_weights(model_config.model)):
            return None  # a draft model is another model, unless its weights are among those of the one that it serves
        return model_config.model, uri.rstrip("/")

    def _get_weights_iterator(self, source: Any) -> Weights:
        if self._replaced is not None and source.model_or_path == self._replaced[0]:
            return self._weights_at(source, self._replaced[1])
        if training_checkpoint_at(source.model_or_path, self._reader_settings):
            return self._weights_at(source, source.model_or_path)
        with _exchange:
            original = getattr(default_loader, _ITERATOR)
            setattr(default_loader, _ITERATOR, self._weights(original))
            try:
                return super()._get_weights_iterator(source)  # type: ignore[no-any-return]
            finally:
                setattr(default_loader, _ITERATOR, original)

    def _weights_at(self, source: Any, uri: str) -> Weights:
        """What vLLM's own method gives for a source, read from ``uri``."""
        # Both attributes are of newer versions.
        subfolder, patterns = getattr(source, "subfolder", None), getattr(source, "allow_patterns_overrides", None)
        files = weights_at(uri, self._reader_settings, subfolder=subfolder, patterns=patterns)
        if not self.counter_before_loading_weights:
            self.counter_before_loading_weights = time.perf_counter()
        weights = self._weights(getattr(default_loader, _ITERATOR))(
            files, self.load_config.use_tqdm_on_load, local_expert_ids=getattr(self, "local_expert_ids", None)
        )
        return ((source.prefix + name, tensor) for name, tensor in weights)

    def _weights(self, original: Callable[..., Weights]) -> Callable[..., Weights]:
        """What stands in for vLLM's iterator, with its arguments."""

        def weights(
            files: list[str] | TrainingCheckpoint,
            use_tqdm_on_load: bool,
            strategy: str | None = None,
            *args: Any,
            local_expert_ids: set[int] | None = None,
            **options: Any,
        ) -> Weights:
            if strategy == "torchao":
                # These files hold flattened tensor subclasses that only vLLM's iterator puts together again.
                logger.warning("%s: torchao checkpoints are read by vLLM's own reader", LOAD_FORMAT)
                return original(files, use_tqdm_on_load, strategy, *args, local_expert_ids=local_expert_ids, **options)
            return read_weights(
                files,
                self._reader_settings,
                log=logger,
                show_progress=use_tqdm_on_load,
                skip=_skip_experts(local_expert_ids),
                note=self._note,
                direct=self._direct,
                device=self._device,
            )

        return weights


def _expects(model: torch.nn.Module) -> Callable[[str], bool]:
    """Whether a tensor, by its name in the checkpoint, is of a layer of this pipeline stage, as far as that can be
    told."""
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
    """Show what this package logs in vLLM's way: vLLM sets up its own logger only."""
    ours, theirs = logging.getLogger("engine_loader"), logging.getLogger("vllm")
    if not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)
