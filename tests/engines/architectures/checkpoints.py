"""Tiny checkpoints of vLLM's architectures: made by transformers' own model classes where there are any, and otherwise
of what vLLM's model asks for.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from tests.support.tiny_models import SINGLE_FILE, make_tokenizer
from tests.support.vllm_inprocess import load_model

from .families import Family, family_of
from .inverting import checkpoint_of
from .shrinking import VOCAB, shrunk

SEED = 20
_DRAFT = "draft"


class NotMadeError(Exception):
    """There is no tiny checkpoint of an architecture; the message says why."""


def make_checkpoint(architecture: str, directory: str | os.PathLike[str], *, as_asked: bool = False) -> Path:
    """Write a tiny random checkpoint of an architecture of vLLM's registry, with its configuration and a tokenizer.

    Its weights are those of transformers' class, where there is one, unless ``as_asked``: then they are what vLLM's
    model asks for. (transformers gives some of its models new names; public checkpoints have the old ones.) That of a
    draft model is put into the folder ``draft`` of the model that it serves.

    Raises:
        NotMadeError: nobody knows its configuration.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    directory, family = Path(directory), family_of(architecture)
    if family.drafts_for is not None:
        make_checkpoint(family.drafts_for, directory)
    as_asked = as_asked or not made_by_transformers(architecture)
    _make(architecture, family, directory / _DRAFT if family.drafts_for else directory, weights=not as_asked)
    if as_asked:
        model = load_model(directory, "dummy", **arguments_of(architecture, directory))
        path = (directory / _DRAFT if family.drafts_for else directory) / SINGLE_FILE
        save_file(checkpoint_of(model), path, metadata={"format": "pt"})
    return directory


def arguments_of(architecture: str, directory: Path) -> dict[str, Any]:
    """Arguments of ``load_model`` for the checkpoint that ``make_checkpoint`` wrote into ``directory``."""
    family = family_of(architecture)
    arguments: dict[str, Any] = {"trust_remote_code": True, **family.arguments}
    if family.drafts_for is not None:
        draft = {"model": str(directory / _DRAFT), "method": family.method, "num_speculative_tokens": 2}
        arguments |= {"of_draft": True, "speculative_config": draft}
    return arguments


def made_by_transformers(architecture: str) -> bool:
    """Whether the weights of an architecture's checkpoint are made by transformers."""
    family = family_of(architecture)
    return family.made_by != "" and hasattr(transformers, family.made_by or architecture)


def _make(architecture: str, family: Family, directory: Path, *, weights: bool) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    made_by = getattr(transformers, family.made_by or architecture, None)
    config = _config(family, made_by)
    if weights:
        _save_random(made_by, config, directory)
    else:
        config.save_pretrained(directory)
    path = directory / "config.json"
    content = json.loads(path.read_text()) | {"architectures": [family.named or architecture], "dtype": "bfloat16"}
    path.write_text(json.dumps(content, indent=2) + "\n")
    make_tokenizer(directory, vocab_size=VOCAB)


def _config(family: Family, made_by: Any) -> Any:
    config_class = _config_class(family.config) if family.config else getattr(made_by, "config_class", None)
    if config_class is None:
        raise NotMadeError("transformers has no class of this name")
    return config_class(**shrunk(config_class().to_dict(), family.changes))


def _config_class(name: str) -> Any:
    if name.startswith("vllm."):
        from vllm.transformers_utils import configs

        return getattr(configs, name.removeprefix("vllm."))
    return getattr(transformers, name)


def _save_random(made_by: Any, config: Any, directory: Path) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        model = made_by._from_config(config, dtype=torch.bfloat16)
        for parameter in model.parameters():  # initialisation leaves all norms at one and all biases at zero
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory, max_shard_size="100GB")
