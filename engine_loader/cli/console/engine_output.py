"""Runs an engine's code within a command: its output goes to stderr, and its errors become one message."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_engine() -> Iterator[None]:
    """Redirect vLLM's output to stderr, and turn its exceptions into one message.

    Raises:
        EngineLoaderError: vLLM is not installed, or refuses the model.
    """
    from ...errors import EngineLoaderError

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except ImportError as error:
        vllm = (error.name or "").partition(".")[0] == "vllm"
        what = "vLLM cannot be imported here" if vllm else "vLLM needs what cannot be imported here"
        raise EngineLoaderError(f"{what}: {error}") from error
    except EngineLoaderError:
        raise
    except Exception as error:  # an engine raises exceptions of any class
        raise EngineLoaderError(f"vLLM does not take this model: {error}") from error
