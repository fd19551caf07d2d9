"""SGLang: makes the load format known, and checks at the start that it is.

None of this imports a loader of SGLang, or torch: it runs in every process before arguments are parsed.
"""

from __future__ import annotations

import logging
from typing import Any

from ...compile_cache.key import module_version
from ...errors import SettingsError
from ...plugin import LOAD_FORMAT, failures
from ..common.hooks import wrap

logger = logging.getLogger(__name__)

_OWN_LOADERS = ("auto-round-int8", "bitsandbytes", "gguf")


def register_choice() -> None:
    """Add the format to those that the command line takes."""
    from sglang.srt import server_args

    if LOAD_FORMAT not in server_args.LOAD_FORMAT_CHOICES:
        server_args.add_load_format_choices([LOAD_FORMAT])


def register_load_config() -> None:
    """Have SGLang's configuration hold our loader's class where the format's name is given: that is how SGLang takes
    loaders that it does not know.
    """
    from sglang.srt.configs.load_config import LoadConfig

    def around(original: Any, self: Any) -> None:
        if not isinstance(self.load_format, str) or self.load_format.lower() != LOAD_FORMAT:
            original(self)
            return
        _refuse_weight_cache(self)
        self.load_format = _loader_class()

    wrap(LoadConfig, "_verify_load_format", around)


def check(server_args: Any) -> None:
    """Check that the format is in force and can serve, when it is asked for: here, before any process is started.

    Raises:
        SettingsError: it is not, or cannot; it says why, as far as is known.
    """
    asked = (server_args.load_format, getattr(server_args, "speculative_draft_load_format", None))
    if LOAD_FORMAT not in asked:
        return
    if server_args.load_format == LOAD_FORMAT:
        _refuse_weight_cache(server_args)
        refuse_quantization(server_args)
    from sglang.srt.configs.load_config import LoadConfig

    try:
        given = LoadConfig(load_format=LOAD_FORMAT).load_format
    except SettingsError:
        raise
    except Exception as error:
        raise _not_in_force(f"{type(error).__name__}: {error}") from error
    if given is not _loader_class():
        raise _not_in_force(f"SGLang makes {given!r} of it, not engine_loader's class")


def refuse_quantization(config: Any) -> None:
    """Refuse what SGLang has a loader of its own for, as far as its configuration of a server or of a model says so.

    Raises:
        SettingsError: it is so.
    """
    if getattr(config, "modelopt_quant", None):
        raise bypassed("quantises the model by ModelOpt while it loads it")
    quantization = getattr(config, "quantization", None)
    if quantization in _OWN_LOADERS:
        raise bypassed(f"has a loader of its own for the quantisation {quantization}")


def bypassed(what: str) -> SettingsError:
    """An error that says what SGLang does past this package's loader, and what to do."""
    return SettingsError(
        f"--load-format {LOAD_FORMAT} cannot serve here: SGLang {what}. "
        "Start with --load-format auto, or serve a checkpoint that is quantised already"
    )


def _refuse_weight_cache(config: Any) -> None:
    mode = getattr(config, "weight_cache_mode", "off")
    if mode != "off":
        raise SettingsError(
            f"--load-format {LOAD_FORMAT} and --weight-cache-mode {mode} exclude each other: the weight cache has a "
            "loader of its own. Leave one of them out"
        )


def _loader_class() -> Any:
    try:
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
