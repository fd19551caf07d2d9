"""Which operations and methods of torch are views, which read a tensor's memory, and which expose it."""

from __future__ import annotations

import torch

from .torch_private import PRIVATE_EXPOSING_METHODS, PRIVATE_VIEWS

aten = torch.ops.aten

VIEWS = frozenset(
    getattr(aten, name)
    for name in [
        "alias",
        "as_strided",
        "chunk",
        "detach",
        "diagonal",
        "expand",
        "flatten",
        "movedim",
        "narrow",
        "permute",
        "reshape",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "swapaxes",
        "t",
        "transpose",
        "unbind",
        "unflatten",
        "unfold",
        "unsafe_split",
        "unsqueeze",
        "view",
        "view_as",
        *PRIVATE_VIEWS,
    ]
    if hasattr(aten, name)
)
"""Operations that return views of their first argument, or may."""
READING_VIEWS = frozenset({aten.reshape, aten.flatten})
"""Those of VIEWS that read and copy where no view will do. (Mostly torch takes them apart before they reach the
dispatcher; in inference mode it does not.)"""
EXPOSING_METHODS = (
    "numpy",
    "data_ptr",
    "untyped_storage",
    "storage",
    "__array__",
    "__dlpack__",
    "share_memory_",
    "apply_",
    "map_",
    "map2_",
    *PRIVATE_EXPOSING_METHODS,
)
"""Methods that hand out a tensor's memory past the dispatcher: what is read or written there later is not seen."""
READING_METHODS = ("tolist", "__deepcopy__", "__reduce_ex__", "pin_memory", "new_tensor")
"""Methods that read a tensor's memory past the dispatcher, and have done so when they return."""
VIEWING_METHODS = (
    "chunk",
    "detach",
    "expand",
    "narrow",
    "permute",
    "select",
    "split",
    "squeeze",
    "swapaxes",
    "t",
    "transpose",
    "unbind",
    "unflatten",
    "unsqueeze",
)
"""Methods that return views and nothing else.

For these and PERHAPS_VIEWING_METHODS there are short cuts past the dispatcher, which would cost several times as much;
the rest of VIEWS goes through it. (``__getitem__`` must, too: to define it makes a class a sequence for C, which
torch's own is not.)
"""
PERHAPS_VIEWING_METHODS = ("contiguous", "flatten", "reshape", "view")
"""Methods that return a view where that is possible, else a copy."""
RESHAPING_METHODS = (
    "t_",
    "squeeze_",
    "unsqueeze_",
    "transpose_",
    "swapaxes_",
    "swapdims_",
    "resize_",
    "resize_as_",
    "as_strided_",
    "set_",
)
"""Methods that change the geometry or the memory of the tensor that they are called on."""
