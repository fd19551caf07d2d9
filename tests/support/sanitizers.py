"""Programs that are compiled with a sanitizer."""

import os


def sanitizer_environment() -> dict[str, str]:
    """This process's environment, without what vLLM, loaded in it before, has set to be preloaded: nothing may come
    before a sanitizer."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
