"""SGLang: makes the load format known, and checks at the start that it is in force.

This runs in every process before arguments are parsed, so it imports neither torch nor a loader of SGLang: the loader
class, which needs both, is imported when a configuration asks for it.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
from importlib.util import find_spec
from typing import Any

from ...compile_cache.host.versions import module_version
from ...errors import SettingsError
from ...plugin import LOAD_FORMAT, failures
from ...replacing import wrap
from ...sources.registry import is_remote
from ..common.children import register_in_receivers
from .options import settings_of
from .refusals import refuse_overlap, refuse_quantization, refuse_weight_cache

logger = logging.getLogger(__name__)


def register_choice() -> None:
    """Add the format to the choices of SGLang's option --load-format."""
    from sglang.srt import server_args

    if LOAD_FORMAT not in server_args.LOAD_FORMAT_CHOICES:
        server_args.add_load_format_choices([LOAD_FORMAT])
    # Encoder workers and the expert backup are spawned with these options, and load no plugins.
    register_in_receivers(server_args.ServerArgs, lambda arguments: arguments.load_format)
    wrap(server_args.ServerArgs, "from_cli_args", _from_cli_args)


def _from_cli_args(original: Any, kind: Any, arguments: Any, *args: Any, **options: Any) -> Any:
    # SGLang knows schemes in capitals, too, and would read such a model past this package; here they are an error.
    if getattr(arguments, "load_format", None) == LOAD_FORMAT and is_remote((arguments.model_path or "").lower()):
        take_from_bucket(arguments)
    return original(kind, arguments, *args, **options)


def take_from_bucket(arguments: Any) -> None:
    """Make of a model's URL a directory with its configuration and tokenizer, and ``weights_uri``.

    SGLang would take it for a model of another loader's, and change the load format.

    Args:
        arguments: of the command line.

    Raises:
        SettingsError: --model-loader-extra-config is no JSON, or has a bad value.
        CheckpointError: there is no model, or the store cannot be reached.
    """
    from ..common.model_files import local_paths

    url = arguments.model_path.rstrip("/")
    settings, extra = settings_of(arguments.model_loader_extra_config)
    tokenizer = getattr(arguments, "tokenizer_path", None)
    arguments.model_path, arguments.tokenizer_path = local_paths(url, tokenizer, settings)
    if settings.weights_uri is None:
        arguments.model_loader_extra_config = json.dumps({**extra, "weights_uri": url})
    if not getattr(arguments, "served_model_name", None):
        # SGLang takes no colon in a name, but for such URLs, which it knows from 0.5.10 on.
        known = find_spec("sglang.srt.utils.runai_utils") is not None
        arguments.served_model_name = url if known else url.rpartition("/")[2]


def register_load_config() -> None:
    """Have SGLang's LoadConfig hold the loader class in place of the format's name: SGLang makes loaders of classes."""
    from sglang.srt.configs.load_config import LoadConfig

    def around(original: Any, self: Any) -> None:
        if not isinstance(self.load_format, str) or self.load_format.lower() != LOAD_FORMAT:
            original(self)
            return
        refuse_weight_cache(self)
        self.load_format = _loader_class()

    wrap(LoadConfig, "_verify_load_format", around)


def check(server_args: Any) -> None:
    """Check that the format, where it is asked for, is in force and can serve. Called before SGLang starts processes.

    Args:
        server_args: SGLang's ServerArgs.

    Raises:
        SettingsError: the format is not in force, or cannot serve; the message says why, as far as is known.
    """
    asked = (server_args.load_format, getattr(server_args, "speculative_draft_load_format", None))
    if LOAD_FORMAT not in asked:
        return
    if server_args.load_format == LOAD_FORMAT:
        refuse_weight_cache(server_args)
        refuse_overlap(server_args)
        refuse_quantization(server_args)
        _check_weights(server_args)
    from sglang.srt.configs.load_config import LoadConfig

    try:
        given = LoadConfig(load_format=LOAD_FORMAT).load_format
    except SettingsError:
        raise
    except Exception as error:
        raise _not_in_force(f"{type(error).__name__}: {error}") from error
    if given is not _loader_class():
        raise _not_in_force(f"SGLang makes {given!r} of it, not engine_loader's class")


def _check_weights(server_args: Any) -> None:
    """Check options and headers in the process that a user looks at."""
    from ..common.cache_hooks import cache_settings
    from ..common.start.warm_weights import begin_to_warm
    from ..common.weights_uri import check_early

    settings, _ = settings_of(getattr(server_args, "model_loader_extra_config", None))
    model = getattr(server_args, "model_path", None)
    if model:
        check_early(model, settings, cache_settings(), functools.partial(begin_to_warm, model, settings, logger))


def _loader_class() -> Any:
    try:
        # First: when it has been imported, the adapter is registered, which must not find itself half imported.
        importlib.import_module("sglang.srt.model_loader.loader")
        from .loader import B10ModelLoader
    except Exception as error:
        raise _not_in_force(f"{type(error).__name__}: {error}") from error
    return B10ModelLoader


def _not_in_force(reason: str) -> SettingsError:
    pieces = "".join(f"; {adapter}: {error}" for adapter, error in failures.items())
    return SettingsError(
        f"--load-format {LOAD_FORMAT} is not in force in SGLang {module_version('sglang')}: {reason}{pieces}. Another "
        "plugin may have replaced what engine_loader extends (SGLANG_PLUGINS=b10_3fs loads this one alone), or this "
        "version is not known to engine_loader: `engine-loader doctor` says more, --load-format auto starts without it"
    )
