"""``engine-loader warm``: reads what an engine opens into the page cache, before it starts or beside it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from ..console.output import console, printable

if TYPE_CHECKING:
    from ...start.page_reading import WarmingEach


def warm(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model's directory, or its name on the hub.")],
) -> None:
    """Read into the page cache what an engine will open, at the lowest priority, as far as there is room.

    First the shared libraries (.so) and compiled modules (.pyc) that the last start on this machine opened, where one
    has left a list of them, then what it restored of a compile cache in a directory, then the model's weights. With
    `start.warm: auto` an engine reads the weights by itself, once it has imported most of what it needs. Run this
    before it, or beside it, and the bytes move from the first moment on. It ends when all is there, when a loader of
    b10_3fs begins to read the model, or when memory for it is used up. What lies in the page cache is not read again.

    **Example**

    ```shell
    engine-loader warm MODEL &
    vllm serve MODEL --load-format b10_3fs
    ```
    """
    from ...engines.common.start.cache_ahead import ahead_of_weights
    from ...engines.common.start.warm_weights import NotWarmedError, described, files_to_warm
    from ...errors import CheckpointError
    from ...settings import load_settings
    from ...start.page_warmer import lower_priority, warm_each, warm_once
    from ...start.warming import WarmingAccount

    settings = load_settings().settings.loader
    before = ahead_of_weights()
    lower_priority()
    try:
        files = files_to_warm(model, settings)
    except NotWarmedError as reason:
        for first in before:
            warm_each(first)
            _tell_ahead(first)
        raise CheckpointError(f"the weights are left alone: {reason}") from None
    began = time.monotonic()
    account = WarmingAccount.of(warm_once(files.paths, ranges=files.ranges, before=before))
    seconds = time.monotonic() - began
    for first in before:
        seconds -= first.seconds
        _tell_ahead(first)
    console().print(printable(f"{model}: {described(account, seconds)}"), soft_wrap=True)


def _tell_ahead(done: WarmingEach) -> None:
    from ...engines.common.start.cache_ahead import ahead_in_words

    if said := ahead_in_words(done):
        console().print(printable(said), soft_wrap=True)
