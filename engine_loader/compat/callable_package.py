"""Makes ``engine_loader.transfer(source, dest)`` a call, though ``engine_loader.transfer`` is a package.

b10_transfer has a function ``transfer``, and its users write ``import engine_loader as b10_transfer``. An attribute has
one value, and a function there would break ``import engine_loader.transfer.plan as plan``. So the package object gets a
class with ``__call__``. ``engine_loader/__init__.py`` sets it; the package ``transfer`` knows nothing of it.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .b10_transfer import OperationStatus


class _CallablePackage(ModuleType):
    def __call__(self, source: str | os.PathLike[str], dest: str | os.PathLike[str]) -> OperationStatus:
        """Copy a file: see ``engine_loader.compat.b10_transfer.transfer``."""
        from .b10_transfer import transfer

        return transfer(source, dest)


def make_callable(package: ModuleType) -> None:
    """Let calls of ``package`` go to b10_transfer's function ``transfer``."""
    package.__class__ = _CallablePackage
