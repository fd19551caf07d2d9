"""``engine-loader warm``: reads a model's weights into the page cache, before an engine starts or beside it."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from ..console.output import console, printable


def warm(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model's directory, or its name on the hub.")],
) -> None:
    """Read a model's weights into the page cache, at the lowest priority, as far as there is room.

    With `start.warm: auto` an engine does this by itself, once it has imported most of what it needs. Run this before
    it, or beside it, and the bytes move from the first moment on. It ends when all is there, when a loader of
    b10_3fs begins to read the model, or when memory for it is used up. What lies in the page cache is not read again.

    **Example**

    ```shell
    engine-loader warm MODEL &
    vllm serve MODEL --load-format b10_3fs
    ```
    """
    from ...engines.common.start.warm_weights import NotWarmedError, described, files_to_warm
    from ...errors import CheckpointError
    from ...settings import load_settings
    from ...start.page_warmer import lower_priority, warm_once
    from ...start.warming import WarmingAccount

    try:
        paths = files_to_warm(model, load_settings().settings.loader)
    except NotWarmedError as reason:
        raise CheckpointError(f"the weights are left alone: {reason}") from None
    lower_priority()
    began = time.monotonic()
    account = WarmingAccount.of(warm_once(paths))
    console().print(printable(f"{model}: {described(account, time.monotonic() - began)}"), soft_wrap=True)
