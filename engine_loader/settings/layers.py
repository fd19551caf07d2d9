"""The layers of settings, and where each value came from.

defaults < YAML file (``ENGINE_LOADER_CONFIG``) < names known from earlier tools < environment (``ENGINE_LOADER_…``,
nested with ``__``) < ``--model-loader-extra-config``, whose keys are those of ``loader``.

Every layer is checked by itself, so a bad value is reported with its own file and line, or variable, also where a later
layer overrides it. (pydantic-settings cannot say where a value stood, and passes over variables that set nothing.)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import SettingsError
from .catalogue import PREFIX, fields, groups
from .messages import explain_problem, explain_unknown_variable, explain_yaml_error
from .schema import Settings

CONFIG_VARIABLE = "ENGINE_LOADER_CONFIG"
_NOT_SETTINGS = {CONFIG_VARIABLE, "ENGINE_LOADER_NATIVE_BUILD"}
# Kubernetes sets these in every pod of a namespace for a Service whose name begins with engine-loader.
_SERVICE_LINK = re.compile(
    r"ENGINE_LOADER_(.+_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)

KNOWN_NAMES = {
    "FASTSAFETENSORS_BACKEND": "loader.engine",
    "FASTSAFETENSORS_DEBUG": "debug",
    "HF3FS_LIB_DIR": "loader.hf3fs_lib_dir",
    "B10FS_CACHE_DIR": "compile_cache.directory",
    "BASETEN_FS_ENABLED": "compile_cache.enabled",
    "LOCAL_WORK_DIR": "compile_cache.work_directory",
    "MAX_CACHE_SIZE_MB": "compile_cache.max_pack_bytes",
    "MIN_LOCAL_SPACE_MB": "compile_cache.min_local_free_bytes",
    "MIN_B10FS_SPACE_MB": "compile_cache.min_store_free_bytes",
    "MAX_CONCURRENT_SAVES": "compile_cache.max_concurrent_saves",
    "CLEANUP_LOCK_TIMEOUT_SECONDS": "compile_cache.lock_timeout_s",
    "CLEANUP_INCOMPLETE_TIMEOUT_SECONDS": "compile_cache.unfinished_timeout_s",
}
"""Variables of earlier tools -> the setting that each sets here.

(TORCHINDUCTOR_CACHE_DIR and the like name the caches themselves.)
"""


@dataclass(frozen=True)
class ResolvedSettings:
    """Settings together with the origin of every value that is not a default.

    Attributes:
        settings: the values.
        origins: dotted name -> "file:line", a variable's name, or "--model-loader-extra-config".
    """

    settings: Settings
    origins: Mapping[str, str]


@dataclass
class Layer:
    """Values of one origin (a file, the environment, an option), where each stands, and what is wrong with them.

    Attributes:
        values: nested as the groups are.
        origins: dotted name -> "file:line", or a variable's or option's name.
        problems: found while reading, a line each.
        prefix: the part of dotted names that this layer leaves out.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    prefix: str = ""

    def put(self, dotted: str, value: Any, origin: str) -> None:
        *groups, last = dotted.split(".")
        values = self.values
        for group in groups:
            values = values.setdefault(group, {})
        values[last] = value
        self.origins[dotted] = origin


def resolve(extra_config: Mapping[str, Any], environ: Mapping[str, str], *, extra_origin: str) -> ResolvedSettings:
    """Read all layers: what ``load_settings`` of this room does, with its arguments and errors."""
    layers = [
        _yaml_layer(environ.get(CONFIG_VARIABLE)),
        _known_names_layer(environ),
        _environment_layer(environ),
        _extra_config_layer(extra_config, extra_origin),
    ]
    problems = [problem for layer in layers for problem in _problems(layer)]
    if problems:
        raise SettingsError("\n".join(problems))
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        _merge(values, layer.values)
        origins.update((name, where) for name, where in layer.origins.items() if name in fields())
    return ResolvedSettings(Settings(**values), origins)


def _yaml_layer(path: str | None) -> Layer:
    layer = Layer()
    if not path:
        return layer
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise SettingsError(f"{path}:{root.start_mark.line + 1}: the file is not a mapping of settings")
        if root is not None:
            _read_mapping(root, path, "", layer)
    except OSError as error:
        raise SettingsError(f"{CONFIG_VARIABLE}: could not read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise SettingsError(explain_yaml_error(path, error)) from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not valid YAML: it is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise SettingsError(f"{path} is not valid YAML: it contains itself, or is nested too deeply") from None
    return layer


def _read_mapping(node: yaml.MappingNode, path: str, prefix: str, layer: Layer) -> None:
    """Put every value below ``node`` into the layer, with the line of its key."""
    seen: set[str] = set()
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            layer.problems.append(f"{where}: a setting's name is a word")
            continue
        key = str(key_node.value)
        if key in seen:
            layer.problems.append(f"{where}: {prefix}{key} is set twice")
            continue
        seen.add(key)
        if isinstance(value_node, yaml.MappingNode) and f"{prefix}{key}" in groups():
            _read_mapping(value_node, path, f"{prefix}{key}.", layer)
            continue
        try:
            value = yaml.SafeLoader("").construct_object(value_node, deep=True)
        except (ValueError, yaml.YAMLError) as error:
            layer.problems.append(f"{where}: {prefix}{key}: {getattr(error, 'problem', None) or error}")
            continue
        # `threads:` without a value, as in a file whose values are commented out, sets nothing.
        if value is not None:
            layer.put(f"{prefix}{key}", value, where)


def _known_names_layer(environ: Mapping[str, str]) -> Layer:
    layer = Layer()
    for variable, dotted in KNOWN_NAMES.items():
        value = environ.get(variable, "").strip()
        if value and variable.endswith("_MB"):
            value = f"{value} MiB" if value.isdigit() else value
        elif variable.startswith("FASTSAFETENSORS_"):
            value = value.lower()
        if value:
            layer.put(dotted, value, variable)
    return layer


def _environment_layer(environ: Mapping[str, str]) -> Layer:
    layer = Layer()
    for variable, value in environ.items():
        if not variable.startswith(PREFIX) or variable in _NOT_SETTINGS or not value.strip():
            continue
        dotted = variable.removeprefix(PREFIX).lower().replace("__", ".")
        if dotted in fields():
            layer.put(dotted, value.strip(), variable)
        elif not _SERVICE_LINK.fullmatch(variable):
            layer.problems.append(explain_unknown_variable(variable, dotted))
    return layer


def _extra_config_layer(extra_config: Mapping[str, Any], origin: str) -> Layer:
    layer = Layer(prefix="loader.")
    for key, value in extra_config.items():
        if value is not None:
            layer.values.setdefault("loader", {})[str(key)] = value
            layer.origins[f"loader.{key}"] = origin
    return layer


def _merge(target: dict[str, Any], values: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in values.items():
        if f"{prefix}{key}" in groups():
            _merge(target.setdefault(key, {}), value, f"{prefix}{key}.")
        else:
            target[key] = value


def _problems(layer: Layer) -> Iterator[str]:
    """Everything that is wrong with a layer, a line each."""
    yield from layer.problems
    try:
        Settings(**layer.values)
    except ValidationError as error:
        lines = [explain_problem(problem, layer.origins, layer.prefix) for problem in error.errors()]
        yield from dict.fromkeys(lines)
