"""Fix-ups (common/fixups.py) of vLLM: faults that keep a restored cache from being used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...replacing import wrap, wrapped_in_thread
from ..common.fixups import Fixup, apply_needed


def register() -> None:
    """Apply the fix-ups that `vllm.compilation.decorators`, just imported, needs."""
    from vllm.compilation import decorators

    apply_needed(FIXUPS, decorators)


def _finalize_only_where_it_can(decorators: Any) -> None:
    """Give functions that are complete as they were loaded a `finalize_loading` that does nothing."""

    def load_and_complete(load: Callable[..., Any], *args: Any, **options: Any) -> Any:
        loaded = load(*args, **options)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda _config: None
        return loaded

    def try_load(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with wrapped_in_thread(decorators.torch.compiler, "load_compiled_function", load_and_complete):
            return original(*args, **options)

    wrap(decorators, "_try_load_aot_compiled_fn", try_load)


FIXUPS = (
    Fixup(
        name="vllm-aot-finalize",
        distribution="vllm",
        module="vllm.compilation.decorators",
        read_up_to=(0, 33),
        upstream="                loaded_fn._artifacts.compiled_fn.finalize_loading(model.vllm_config)\n",
        why="an AOT artifact of the CPU build is a plain function, which has no finalize_loading: the artifact is "
        "never loaded, and everything is compiled again on every start",
        patch="vllm-0.32-aot-finalize.patch",
        apply=_finalize_only_where_it_can,
    ),
)
