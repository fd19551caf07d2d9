"""vLLM's faults that keep a restored cache from being used; see fixups.py."""

from __future__ import annotations

import functools
from typing import Any

from ..common.fixups import APPLIED, Fixup, apply_needed


def register() -> None:
    """Apply what is needed to `vllm.compilation.decorators`, which was imported."""
    from vllm.compilation import decorators

    apply_needed(FIXUPS, decorators)


def _finalize_only_where_it_can(decorators: Any) -> None:
    """Give functions that are complete as they were loaded a `finalize_loading` that does nothing."""
    original = decorators._try_load_aot_compiled_fn
    if getattr(original, APPLIED, False):
        return

    @functools.wraps(original)
    def try_load(*args: Any, **options: Any) -> Any:
        compiler = decorators.torch.compiler
        load = compiler.load_compiled_function

        @functools.wraps(load)
        def load_and_complete(*load_args: Any, **load_options: Any) -> Any:
            loaded = load(*load_args, **load_options)
            compiled = loaded._artifacts.compiled_fn
            if not hasattr(compiled, "finalize_loading"):
                compiled.finalize_loading = lambda _config: None
            return loaded

        compiler.load_compiled_function = load_and_complete
        try:
            return original(*args, **options)
        finally:
            compiler.load_compiled_function = load

    setattr(try_load, APPLIED, True)
    decorators._try_load_aot_compiled_fn = try_load


FIXUPS = (
    Fixup(
        name="vllm-aot-finalize",
        distribution="vllm",
        module="vllm.compilation.decorators",
        first=(0, 10),
        last=(0, 32),
        upstream="                loaded_fn._artifacts.compiled_fn.finalize_loading(model.vllm_config)\n",
        why="an AOT artifact of the CPU build is a plain function, which has no finalize_loading: the artifact is "
        "never loaded, and everything is compiled again on every start",
        patch="vllm-0.32-aot-finalize.patch",
        apply=_finalize_only_where_it_can,
    ),
)
