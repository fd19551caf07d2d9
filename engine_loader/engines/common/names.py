"""Names of a training checkpoint that are not the model's: an error with both, and the ``key_mapping`` that helps."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...errors import CheckpointError, EngineLoaderError
from ...loading.training.key_mapping import Renamer, make_renamer
from ...loading.training.store import TrainingStore
from ...settings import LoaderSettings
from ...sources.registry import make_source
from .weights_uri import training_checkpoint_at

_SHOWN = 3
_QUOTED = re.compile(r"""['"`]([^'"`\s]+)['"`]""")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and activation checkpointing put into names."""
_EXPERT = re.compile(r"\.experts\.[0-9]+\.")
_LAYER_DEPTH = 3
"""``model.layers.0`` has as many parts: below it, an engine fuses and renames what is in the checkpoint."""


def is_of_one_expert(name: str) -> bool:
    """Whether a tensor is of one expert of a layer: with expert parallelism, one rank keeps all of it."""
    return _EXPERT.search(name) is not None


@contextmanager
def explaining_misfits(model: torch.nn.Module, weights: str, settings: LoaderSettings) -> Iterator[None]:
    """While the block runs, turn an engine's error into one that shows the checkpoint's names and the model's.

    An engine raises whatever error it comes to when a training checkpoint has other names than the model. Other errors
    are left as they are.

    Args:
        model: the model that is being loaded.
        weights: path of its weights; where this is no training checkpoint, errors are left as they are.
        settings: how to read.

    Raises:
        CheckpointError: most names are not the model's, or the error is about some that are not; it suggests a
            ``key_mapping``.
    """
    try:
        yield
    except EngineLoaderError:
        raise
    except Exception as error:  # engines raise whatever it comes to
        training = training_checkpoint_at(weights, settings)
        if training is None:
            raise
        source = make_source(settings.backend, settings=settings)
        with TrainingStore(source, training.directory, settings, key_mapping={}) as store:
            misfit = _misfit(model, list(store.tensors), make_renamer(settings.key_mapping), weights, error)
        if misfit is None:
            raise
        raise misfit from error


@dataclass(frozen=True)
class _Change:
    """One expression and its replacement, as in ``key_mapping``."""

    pattern: str
    replacement: str

    def apply(self, name: str) -> str:
        return re.sub(self.pattern, self.replacement, name) if self.pattern else name


def suggest_mapping(names: Sequence[str], model: torch.nn.Module) -> dict[str, str] | None:
    """The ``key_mapping`` with which most of a checkpoint's names would be the model's; None where none was found."""
    fits = _Fits(model)
    before = fits.count(names)
    best, most = None, max(before, len(names) // 2)
    for change in _changes(names, fits):
        count = fits.count(map(change.apply, names))
        if count > most:
            best, most = change, count
    return None if best is None else {best.pattern: best.replacement}


class _Fits:
    """Called with a name: true if the model has it, or has a layer of that name's. Engines rename what layers hold."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters = [name for name, _ in model.named_parameters()]
        self._known = {*self.parameters, *(name for name, _ in model.named_buffers())}
        self._layers = {name for name, _ in model.named_modules() if name.count(".") + 1 == _LAYER_DEPTH}

    def __call__(self, name: str) -> bool:
        return name in self._known or ".".join(name.split(".")[:_LAYER_DEPTH]) in self._layers

    def count(self, names: Iterable[str]) -> int:
        return sum(map(self, names))


def _changes(names: Sequence[str], fits: _Fits) -> Iterator[_Change]:
    """What is commonly to be changed: a prefix that is too many, too few, or another; the names of wrappers."""
    wrappers = [f"{wrapper}[.]" for wrapper in _WRAPPERS if any(f"{wrapper}." in name for name in names)]
    bare = [_Change("|".join(wrappers), "").apply(name) for name in names]
    if wrappers:
        yield _Change("|".join(wrappers), "")
    fitting = sorted({name.partition(".")[0] for name in bare if fits(name)})
    for wanted in ("", *_prefixes(fits.parameters)):
        for prefix in ("", *_prefixes(bare)):
            if prefix == wanted:
                continue
            first = f"^{re.escape(prefix)}".replace(r"\.", "[.]")
            if not prefix and fitting:
                first = f"^(?!({'|'.join(map(re.escape, fitting))})[.])"
            yield _Change(first if wanted else "|".join([first, *wrappers]), wanted)


def _prefixes(names: Sequence[str]) -> list[str]:
    """Those that most of the names have, the shortest first."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts.update(".".join(parts[:number]) + "." for number in range(1, min(len(parts), 5)))
    return sorted((prefix for prefix, count in counts.items() if 2 * count >= len(names)), key=len)


def _misfit(
    model: torch.nn.Module, names: Sequence[str], rename: Renamer, weights: str, error: Exception
) -> CheckpointError | None:
    """``names`` are the training's; ``rename`` is what is set so far."""
    fits = _Fits(model)
    renamed = [new for name in names if (new := rename(name)) is not None]
    if 2 * fits.count(renamed) >= len(renamed):
        return _surplus(model, names, rename, fits, weights, error)
    mapping = suggest_mapping(names, model)
    hint = "set key_mapping to regular expressions, or to a function, that make the model's names of them"
    if mapping is not None:
        hint = f"set --model-loader-extra-config '{json.dumps({'key_mapping': mapping})}'"
    became = "" if renamed == names else f", of which key_mapping makes {_shown(renamed)}"
    return CheckpointError(
        f"the names in this training checkpoint are not those of {type(model).__name__}: "
        f"it has {_shown(names)}{became}; the model has {_shown(fits.parameters)}; the engine said: {_said(error)}",
        file=weights,
        hint=hint,
    )


def _surplus(
    model: torch.nn.Module, names: Sequence[str], rename: Renamer, fits: _Fits, weights: str, error: Exception
) -> CheckpointError | None:
    """Where most names are the model's: an error about those that are not, if the engine's is about one of them."""
    surplus = [name for name in names if (new := rename(name)) is not None and not fits(new)]
    quoted = set(_QUOTED.findall(str(error)))
    named = [name for name in surplus if any(_is_about(text, rename(name) or name) for text in quoted)]
    if not named:
        return None
    # What the engine comes to next is left out at once.
    groups = sorted({_group(name, names, fits, rename) for name in surplus})
    mapping = {f"^{re.escape(group)}([.]|$)".replace(r"\.", "[.]"): None for group in groups[:_SHOWN]}
    return CheckpointError(
        f"this training checkpoint has {_shown(surplus)}, for which {type(model).__name__} has no parameter; "
        f"the engine said: {_said(error)}",
        file=weights,
        hint=f"to leave them out, add to key_mapping: {json.dumps(mapping)}; or give them the model's names there",
    )


def _is_about(text: str, name: str) -> bool:
    """Whether what an engine's error quotes is a name, or the beginning or the end of one."""
    return name == text or name.startswith(f"{text}.") or name.endswith(f".{text}")


def _group(name: str, names: Sequence[str], fits: _Fits, rename: Renamer) -> str:
    """The first keys of a name, as few as no name of the model's begins with."""
    keys = name.split(".")
    kept = [other for other in names if (new := rename(other)) is not None and fits(new)]
    for length in range(1, len(keys)):
        group = ".".join(keys[:length])
        if not any(other == group or other.startswith(f"{group}.") for other in kept):
            return group
    return name


def _said(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _shown(names: Sequence[str]) -> str:
    """A few, from all over."""
    some = list(dict.fromkeys(names[number * (len(names) - 1) // max(1, _SHOWN - 1)] for number in range(_SHOWN)))
    return ", ".join(map(repr, some)) if names else "none"
