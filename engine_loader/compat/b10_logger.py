"""The loggers of b10_transfer, for programs that log by them."""

from __future__ import annotations

import logging

_FORMAT = "%(levelname)s - [b10-transfer log] %(message)s"


def get_b10_logger(name: str) -> logging.Logger:
    """A logger that writes lines like ``INFO - [b10-transfer log] …`` to standard error, from the level INFO.

    Args:
        name: of the logger. Its lines do not go to the loggers above it as well.
    """
    logger = logging.getLogger(name)
    if not any(isinstance(handler, _Handler) for handler in logger.handlers):
        handler = _Handler()
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # of sys.stderr
    """Known by its class, so that a logger gets one only."""
