"""Runs an engine's code within a command: its output goes to stderr, and its errors become one message."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator

_LEVEL = "VLLM_LOGGING_LEVEL"
_MOST_CAUSES = 4
_MOST_CHARS = 500
_REFUSAL = re.compile(
    r"not (yet |currently )?supported|unsupported|do(es)?(n't| not) (yet |currently )?support|not recogni[sz]e"
    r"|cannot find model|must be divisible|unknown quantization",
    re.IGNORECASE,
)
"""What vLLM and transformers write where they refuse a model, or a model with these options."""


@contextlib.contextmanager
def quiet_engine(what: str) -> Iterator[None]:
    """Redirect vLLM's output to stderr, and turn its exceptions into one message.

    With VLLM_LOGGING_LEVEL=DEBUG, which is told with the message, stderr has the traceback, too.

    Args:
        what: the block does, for the message, e.g. "resharding".

    Raises:
        EngineLoaderError: vLLM is not installed, refuses the model, or something else failed.
    """
    from ...errors import EngineLoaderError

    os.environ.setdefault(_LEVEL, "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except ImportError as error:
        vllm = (error.name or "").partition(".")[0] == "vllm"
        needs = "vLLM cannot be imported here" if vllm else "vLLM needs what cannot be imported here"
        raise EngineLoaderError(f"{needs}: {error}") from error
    except EngineLoaderError:
        raise
    except Exception as error:  # an engine raises exceptions of any class
        if os.environ[_LEVEL].upper() == "DEBUG":
            traceback.print_exc()
        if _is_refusal(error):
            raise EngineLoaderError(f"vLLM does not take this model: {error}") from error
        raise EngineLoaderError(f"{what} failed: {_chain_in_words(error)}; {_LEVEL}=DEBUG shows all of it") from error


def _is_refusal(error: Exception) -> bool:
    """Whether an error says that the model is refused: one that only happened in between says nothing of that."""
    return isinstance(error, ValueError | NotImplementedError) and _REFUSAL.search(str(error)) is not None


def _chain_in_words(error: BaseException) -> str:
    """An error and its causes, each with the place that raised it."""
    told = [_in_words(error)]
    cause = _cause_of(error)
    while cause is not None and len(told) <= _MOST_CAUSES:
        told.append(_in_words(cause))
        cause = _cause_of(cause)
    return ", caused by ".join(told)


def _cause_of(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _in_words(error: BaseException) -> str:
    text = "; ".join(filter(None, map(str.strip, str(error).splitlines())))
    said = f"{type(error).__name__}: {text[:_MOST_CHARS]}" if text else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return said
    last = frames[-1]
    file = last.filename.rpartition("/site-packages/")[2]
    return f"{said} ({file}, line {last.lineno}, in {last.name})"
