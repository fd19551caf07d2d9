"""Every private name of torch that direct mode uses: a new version of torch is checked against this file.

The functions are those of C, not the methods of ``torch.Tensor``, which settling.py replaces while a load runs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils import _python_dispatch, _pytree

storage_of = torch._C.TensorBase.untyped_storage
"""The storage of a tensor."""
storage_id = operator.attrgetter("_cdata")
"""A number that tells storages apart: the address of C's object, which lives as long as the storage."""
address_of = torch._C.TensorBase.data_ptr
"""The address of a tensor's first element."""
data_property: Any = torch._C.TensorBase.data
"""The property ``Tensor.data``."""
copy_into: Any = torch._C.TensorBase.copy_
"""``target.copy_(source)``."""
without_dispatch = torch._C._DisableTorchDispatch
"""A context manager within which operations reach no dispatch mode and no subclass of Tensor."""
dispatch_mode_count = torch._C._len_torch_dispatch_stack
"""How many dispatch modes are active in this thread."""
dispatch_modes = _python_dispatch._get_current_dispatch_mode_stack
"""The dispatch modes that are active in this thread, the outermost first."""
no_torch_function: Any = torch._C._disabled_torch_function_impl
"""The ``__torch_function__`` of a subclass of Tensor whose operations go to the dispatcher as they are."""
make_wrapper: Any = torch.Tensor._make_wrapper_subclass
"""Makes a tensor of a subclass that has a geometry and no data."""
packet_of = operator.attrgetter("_overloadpacket")
"""The operation (``aten.copy_``) of one of its overloads (``aten.copy_.default``)."""
tree_map = _pytree.tree_map
"""Applies a function to the leaves of nested lists, tuples and dictionaries."""

PRIVATE_VIEWS = ("_unsafe_view", "_reshape_alias")
"""Operations of ``torch.ops.aten`` that return views."""
PRIVATE_EXPOSING_METHODS = ("_typed_storage",)
"""Methods of Tensor that hand out its memory."""
PARAMETER_MARK = "_is_param"
"""The attribute by which torch takes a tensor of a subclass for a Parameter."""


class DispatchMode(_python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode during which nothing is compiled."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would cost microseconds with every call


def aliased_arguments(func: Any) -> Iterator[tuple[int, str]]:
    """(position, name) of the arguments that an operation writes to, or returns the memory of."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None:
            yield position, argument.name


def operation_name(packet: Any) -> str:
    """``c10d::allreduce_`` of the operation ``torch.ops.c10d.allreduce_``."""
    return str(packet._qualified_op_name)


def collective_classes() -> tuple[tuple[Any, ...], Any]:
    """The classes whose methods all collectives of torch.distributed end in, and the base class of its stores."""
    c10d = torch._C._distributed_c10d
    return (c10d.ProcessGroup, c10d.Backend), c10d.Store


def parameters_of(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """The module's own parameters, by name; to write to it is to replace them without a check of their type."""
    return module._parameters


def attributes_of(module: torch.nn.Module) -> Sequence[dict[str, Any]]:
    """Where a module's own tensors may be, each by name: parameters, buffers, plain attributes."""
    return module._parameters, module._buffers, vars(module)
