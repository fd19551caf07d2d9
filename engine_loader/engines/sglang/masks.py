"""SGLang: which of its own formats this package's loader passes for, so that SGLang picks the files that it would pick.

With --load-format auto SGLang decides from the model's directory between its formats "mistral" and "auto"; with the
name of another format it does not look. Read in 0.5.10 to 0.5.23. Nothing here imports SGLang or torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

MISTRAL_PATTERNS = ("consolidated*.safetensors",)
_NATIVE = ("mistral-large-3", "mistral-small-4", "leanstral")


def mask_of(model: str, names: Iterable[str]) -> str:
    """The format of SGLang's whose files are this model's.

    "mistral" where Mistral's own files are the only ones, or the model is of a family that is loaded from these. Else
    "auto": safetensors files, or, where a model has none, PyTorch's, which SGLang's own reader reads.

    Args:
        model: the model's path or name.
        names: names of the files in its directory, and of its weights.
    """
    names = list(names)
    if "params.json" in names and any(family in model.lower() for family in _NATIVE):
        return "mistral"
    consolidated = any(fnmatchcase(name, pattern) for name in names for pattern in MISTRAL_PATTERNS)
    return "mistral" if consolidated and not any(fnmatchcase(name, "model*.safetensors") for name in names) else "auto"


def patterns_of(mask: str, patterns: Sequence[str] | None) -> Sequence[str] | None:
    """``patterns`` that a model has of its own, else those of the mask, else None: all safetensors files."""
    return MISTRAL_PATTERNS if not patterns and mask == "mistral" else patterns
