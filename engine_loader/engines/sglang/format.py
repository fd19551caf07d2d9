"""SGLang: makes the load format known, and checks at the start that it is in force.

This runs in every process before arguments are parsed, so it imports neither torch nor a loader of SGLang: the loader
class, which needs both, is imported when a configuration asks for it.
"""

from __future__ import annotations

import logging
from typing import Any

from ...compile_cache.host.versions import module_version
from ...errors import SettingsError
from ...plugin import LOAD_FORMAT, failures
from ...replacing import wrap
from .refusals import refuse_quantization, refuse_weight_cache

logger = logging.getLogger(__name__)


def register_choice() -> None:
    """Add the format to the choices of SGLang's option --load-format."""
    from sglang.srt import server_args

    if LOAD_FORMAT not in server_args.LOAD_FORMAT_CHOICES:
        server_args.add_load_format_choices([LOAD_FORMAT])


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
