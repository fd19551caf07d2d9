"""How bytes move: plans of extents, the reader threads that carry them out, and the buffers they fill.

`engine_loader.transfer` is two things: this package, and b10_transfer's function of that name, which its users call
as `b10_transfer.transfer(source, dest)`. Importing the package puts it over any function of the same name in
`engine_loader`, so that the package itself is what can be called.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType


class _CallablePackage(ModuleType):
    def __call__(self, source: str | os.PathLike[str], dest: str | os.PathLike[str]) -> object:
        """Do what `engine_loader.compile_cache.api.transfer` does, and return its OperationStatus."""
        # By name: this package knows nothing of the caches.
        return import_module("engine_loader.compile_cache.api").transfer(source, dest)


sys.modules[__name__].__class__ = _CallablePackage
