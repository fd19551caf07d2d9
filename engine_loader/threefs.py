"""Another name of engine_loader.compat.fastsafetensor_3fs_reader, the drop-in for the package of that name."""

from .compat.fastsafetensor_3fs_reader import *  # noqa: F403
from .compat.fastsafetensor_3fs_reader import __all__  # noqa: F401
