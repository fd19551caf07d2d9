"""``engine-loader warm``: reads what an engine opens into the page cache, before it starts or beside it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Annotated

import typer

from ..console.output import console, printable

if TYPE_CHECKING:
    from ...engines.common.start.warm_weights import FilesToWarm
    from ...settings import Settings
    from ...start.page_reading import WarmingEach
    from ...start.warming import WarmingAccount


def warm(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model's directory, or its name on the hub.")],
) -> None:
    """Read into the page cache what an engine will open, at the lowest priority, as far as there is room.

    Weights that are read past the page cache (3FS, O_DIRECT, object stores) go into memory of a process, which keeps
    them until the loader has taken them over.

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

    settings = load_settings().settings
    before = ahead_of_weights()
    lower_priority()
    try:
        files = files_to_warm(model, settings.loader)
    except NotWarmedError as reason:
        for first in before:
            warm_each(first)
            _tell_ahead(first)
        raise CheckpointError(f"the weights are left alone: {reason}") from None
    began = time.monotonic()
    if files.past_page_cache:
        # Beside the rest, which comes from elsewhere. Its process ends with this one.
        keeping = threading.Thread(target=_keep, args=(model, files, settings), daemon=True)
        keeping.start()
        for first in before:
            warm_each(first)
            _tell_ahead(first)
        keeping.join()
        return
    account = WarmingAccount.of(warm_once(files.paths, ranges=files.ranges, before=before))
    seconds = time.monotonic() - began
    for first in before:
        seconds -= first.seconds
        _tell_ahead(first)
    console().print(printable(f"{model}: {described(account, seconds)}"), soft_wrap=True)


def _keep(model: str, files: FilesToWarm, settings: Settings) -> None:
    from ...ahead.stocking import stock_files
    from ...engines.common.start.warm_weights import stock_described

    began = time.monotonic()

    def tell(account: WarmingAccount) -> None:
        words = stock_described(account, time.monotonic() - began)
        console().print(printable(f"{model}: {words}"), soft_wrap=True)

    stock_files(files.paths, files.ranges, settings.loader, int(settings.start.warm_bytes), tell)


def _tell_ahead(done: WarmingEach) -> None:
    from ...engines.common.start.cache_ahead import ahead_in_words

    if said := ahead_in_words(done):
        console().print(printable(said), soft_wrap=True)
