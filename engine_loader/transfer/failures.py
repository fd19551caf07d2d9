"""Moved to engine_loader/failures.py; this name goes when the engines import it from there."""

from ..failures import RETRYABLE, deadline_passed, end_of_file, errno_hint, io_error

__all__ = ["RETRYABLE", "deadline_passed", "end_of_file", "errno_hint", "io_error"]
