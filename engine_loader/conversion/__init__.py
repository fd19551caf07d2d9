"""From one kind of checkpoint to another, as a stream: ``convert_checkpoint``."""

from .convert import Conversion, convert_checkpoint

__all__ = ["Conversion", "convert_checkpoint"]
