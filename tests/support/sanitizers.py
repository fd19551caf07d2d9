"""Programs that are compiled with a sanitizer."""

import os
import subprocess
from collections.abc import Sequence


def sanitizer_environment() -> dict[str, str]:
    """This process's environment, without what vLLM, loaded in it before, has set to be preloaded: nothing may come
    before a sanitizer."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def run_sanitized(command: Sequence[str], sanitizers: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a program that was compiled with these sanitizers."""
    if sanitizers == "thread":
        # ThreadSanitizer has fixed ideas of the address space; newer kernels' randomization does not keep to them.
        command = ["setarch", "--addr-no-randomize", *command]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env=sanitizer_environment()
    )
