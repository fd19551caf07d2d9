"""What a person names as a model: a path, a URL, or the name of a model on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import CheckpointError
from .registry import is_remote

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def model_here(name: str) -> str:
    """The path or URL of a model; of a model on the hub, its newest snapshot in the local cache.

    Nothing is downloaded.

    Raises:
        CheckpointError: ``OWNER/NAME`` is neither a path nor in the cache.
    """
    if is_remote(name) or os.path.lexists(name) or not _HUB_NAME.fullmatch(name):
        return name
    model = _hub_cache() / f"models--{name.replace('/', '--')}"
    snapshot = _newest_snapshot(model)
    if snapshot is not None:
        return str(snapshot)
    if "/" not in name:  # a file or a directory that is not there: whoever opens it says so
        return name
    raise CheckpointError(
        f"this is not a path here, and no model of this name is in the hub's local cache, {_hub_cache()}",
        file=name,
        hint=f"check the path, or download the model: hf download {name}",
    )


def _hub_cache() -> Path:
    """Where huggingface_hub keeps models; asked without it, for it takes long to import."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if cache:
        return Path(os.path.expanduser(cache))
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    return Path(os.path.expanduser(home), "hub")


def _newest_snapshot(model: Path) -> Path | None:
    """The snapshot of the branch main, else the one that was made last."""
    snapshots = model / "snapshots"
    try:
        named = snapshots / (model / "refs" / "main").read_text().strip()
        if named.is_dir():
            return named
    except OSError:
        pass
    try:
        made = [path for path in snapshots.iterdir() if path.is_dir()]
    except OSError:
        return None
    return max(made, key=lambda path: path.stat().st_mtime_ns, default=None)
