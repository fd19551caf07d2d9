"""vLLM: names and types of the weights, which vLLM asks for before it builds a model.

From the headers in the model's own directory vLLM decides whether a head is tied to the embedding, which layers of an
AWQ or GPTQ model are quantised, and the dtype where the configuration has none. Weights that lie elsewhere
(``weights_uri``), or in a training checkpoint, have to answer here, or the model is built for others. Read in vLLM
0.32; older versions that do not ask have nothing that is wrapped.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property, partial
from typing import Any

from ...loading.find import NoCheckpointError
from ...plugin import LOAD_FORMAT
from ...replacing import wrap
from ...settings import LoaderSettings
from ...sources.registry import is_remote
from ..common.cache_hooks import cache_settings
from ..common.model_files import local_paths
from ..common.start.warm_weights import begin_to_warm
from ..common.weights_uri import check_early, headers_of, training_checkpoint_at, weights_at
from .options import settings_of

logger = logging.getLogger("vllm.engine_loader")

_ASKED = "get_safetensors_params_metadata"

Headers = Mapping[str, Mapping[str, Any]]
"""Name -> what a safetensors header says of the tensor (``dtype``, ``shape``)."""


def register() -> None:
    """Have vLLM's EngineArgs make its configuration with the headers of the weights that will be loaded."""
    from vllm.engine.arg_utils import EngineArgs

    wrap(EngineArgs, "create_engine_config", _create_engine_config)


class WeightHeaders:
    """The headers of the weights that a model is loaded from; read once, when they are asked for.

    Args:
        model: the model's directory, or its name on the hub.
        settings: how to read; with ``weights_uri``, the weights there answer for the model.
    """

    def __init__(self, model: str, settings: LoaderSettings) -> None:
        self._model = model
        self._settings = settings

    def of(self, model: str) -> Headers | None:
        """The headers of a model's weights; None where vLLM's own look into its directory is right.

        Raises:
            CheckpointError: the weights cannot be read.
        """
        if self._settings.weights_uri is not None and os.path.normpath(model) == os.path.normpath(self._model):
            return self._at_uri
        training = training_checkpoint_at(model, self._settings)
        return None if training is None else headers_of(training, self._settings)

    @cached_property
    def _at_uri(self) -> Headers:
        uri = self._settings.weights_uri
        assert uri is not None
        try:
            weights = weights_at(uri.rstrip("/"), self._settings)
        except NoCheckpointError:
            return {}  # a model may have patterns that name folders: loading it says what is missing
        return headers_of(weights, self._settings)


_current: ContextVar[WeightHeaders | None] = ContextVar("engine_loader_weight_headers", default=None)


@contextmanager
def answering(headers: WeightHeaders) -> Iterator[None]:
    """While the block runs, this thread's questions of vLLM for headers are answered by ``headers`` first."""
    # Modules import the function by its name, before or after this package is loaded.
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and hasattr(module, _ASKED):
            wrap(module, _ASKED, _answer)
    token = _current.set(headers)
    try:
        yield
    finally:
        _current.reset(token)


def _answer(original: Callable[..., Headers], model: Any, *args: Any, **options: Any) -> Headers:
    headers = _current.get()
    found = None if headers is None else headers.of(os.fspath(model))
    return original(model, *args, **options) if found is None else found


def _create_engine_config(original: Callable[..., Any], arguments: Any, *args: Any, **options: Any) -> Any:
    if arguments.load_format != LOAD_FORMAT or not isinstance(arguments.model_loader_extra_config, Mapping):
        return original(arguments, *args, **options)
    settings, _ = settings_of(arguments.model_loader_extra_config)
    if is_remote(arguments.model):
        settings = _take_from_bucket(arguments, settings)
    check_early(arguments.model, settings, cache_settings(), partial(begin_to_warm, arguments.model, settings, logger))
    with answering(WeightHeaders(arguments.model, settings)):
        return original(arguments, *args, **options)


def _take_from_bucket(arguments: Any, settings: LoaderSettings) -> LoaderSettings:
    """Make of a model's URL a directory with its configuration and tokenizer, and ``weights_uri``.

    vLLM would take it for a model of another loader's, and refuse the load format. Clients know the model by its URL.
    """
    url = arguments.model.rstrip("/")
    arguments.model, arguments.tokenizer = local_paths(url, arguments.tokenizer, settings)
    if not arguments.served_model_name:
        arguments.served_model_name = [url]
    if settings.weights_uri is None:
        arguments.model_loader_extra_config = {**arguments.model_loader_extra_config, "weights_uri": url}
        settings = settings.model_copy(update={"weights_uri": url})
    return settings
