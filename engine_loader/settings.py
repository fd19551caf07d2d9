"""The settings: one typed tree, and where each value came from.

defaults < YAML file (``ENGINE_LOADER_CONFIG``) < names known from earlier tools < environment (``ENGINE_LOADER_…``,
nested with ``__``) < ``--model-loader-extra-config``, whose keys are those of ``loader``.

Every layer is checked by itself, so a bad value is reported with its own file and line, or variable, also where a later
layer overrides it. (pydantic-settings cannot say where a value stood, and passes over variables that set nothing.)
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from .errors import SettingsError

CONFIG_VARIABLE = "ENGINE_LOADER_CONFIG"
PREFIX = "ENGINE_LOADER_"
EXTRA_CONFIG = "--model-loader-extra-config"
_NOT_SETTINGS = {CONFIG_VARIABLE, "ENGINE_LOADER_NATIVE_BUILD"}
# Kubernetes sets these in every pod beside a Service named engine-loader.
_SERVICE_LINK = re.compile(r"ENGINE_LOADER_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_\d+_(TCP|UDP|SCTP)(_.*)?)?)")
_FUNCTION = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")
_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
_MOST_BYTES = 1 << 50
_SHOWN_CHARS = 100

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


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic takes true for 1: `threads: true` would be one thread.
        if isinstance(value, bool) and info.field_name and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("this takes neither true nor false")
        return value


class LoaderSettings(_Group):
    """How weights are read (``loader:`` in the YAML file; also the keys of ``--model-loader-extra-config``)."""

    backend: Literal["auto", "posix", "usrbio", "object_store"] = Field(
        default="auto",
        description="Where the files are read from: posix is any mounted file system, usrbio is 3FS past its mount, "
        "object_store is S3, Google Cloud Storage and Azure; auto is object_store for URLs (s3://, gs://, az://), "
        "usrbio for files on 3FS where its library is found, else posix.",
    )
    weights_uri: str | None = Field(
        default=None,
        max_length=2000,
        description="Where an engine reads a model's weights, in place of its directory, which keeps configuration and "
        "tokenizer: s3://bucket/prefix, gs://, az://, or a path; auto: the model's directory.",
    )
    key_mapping: dict[str, str] | str | None = Field(
        default=None,
        description="Of a training checkpoint (torch.distributed.checkpoint), its names -> the model's: regular "
        'expression -> replacement (JSON: {"^model[.]": ""}), or a Python function as "module:function"; auto: as they '
        "are.",
    )
    mode: Literal["auto", "direct", "stream"] = Field(
        default="auto",
        description="How weights reach the model: read straight into its parameters, only what this rank keeps "
        "(direct), or handed to the engine as whole tensors (stream); auto is direct where that can serve.",
    )
    sharded_pattern: str | None = Field(
        default=None,
        max_length=200,
        description="Names of the files of a sharded_state checkpoint, with {rank} (or {tp_rank}), {pp_rank} and "
        "{part}; auto: vLLM's, where the directory has such files.",
    )
    engine: Literal["auto", "cpp", "python", "mock"] = Field(
        default="auto",
        description="What moves the bytes: native reader threads (cpp) or pure-Python ones (python); mock is python.",
    )
    read_mode: Literal["auto", "buffered", "direct", "mapped"] = Field(
        default="auto",
        description="How a file is read: through the page cache (buffered), past it (O_DIRECT), or as mapped pages; "
        "auto picks by file system and by what lies in the page cache.",
    )
    threads: int | None = Field(
        default=None, ge=1, le=256, description="Reading threads; auto: as many as the CPUs and the source can use."
    )
    buffer_bytes: ByteSize = Field(
        default=ByteSize(512 * _MIB),
        ge=_MIB,
        le=_MOST_BYTES,
        description="Memory for tensors on their way; a tensor that is larger gets its own.",
    )
    block_bytes: ByteSize = Field(
        default=ByteSize(16 * _MIB),
        ge=64 * _KIB,
        le=_MOST_BYTES,
        description="Consecutive tensors are streamed in blocks of up to this size.",
    )
    io_bytes: ByteSize = Field(default=ByteSize(4 * _MIB), ge=4 * _KIB, le=_GIB, description="The largest single read.")
    max_tries: int = Field(
        default=5, ge=1, le=100, description="Tries of a read whose error may pass (EIO, ESTALE, …)."
    )
    deadline_s: float = Field(
        default=120.0, gt=0, allow_inf_nan=False, description="Seconds without a single byte after which a load fails."
    )

    device_pinned_bytes: ByteSize = Field(
        default=ByteSize(256 * _MIB),
        ge=_MIB,
        le=_MOST_BYTES,
        description="Page-locked memory for what is on its way to a GPU, for each one that is read to.",
    )
    device_buffer_bytes: ByteSize = Field(
        default=ByteSize(_GIB),
        ge=_MIB,
        le=_MOST_BYTES,
        description="Memory of a GPU for tensors that are streamed there; a tensor that is larger gets its own.",
    )
    stream_device: Literal["auto", "cpu"] = Field(
        default="auto",
        description="Where an engine is handed streamed tensors (mode: stream): on the GPU where all parameters are, "
        "if nothing speaks against it (auto), or in CPU memory.",
    )
    transport: Literal["auto", "gds"] = Field(
        default="auto",
        description="How files reach a GPU: through page-locked memory (auto), or by GPUDirect Storage (gds), with the "
        "copier of fastsafetensors; whole tensors of local safetensors files only.",
    )
    device_runtime: str | None = Field(
        default=None,
        description="The library of CUDA's (or HIP's) runtime; auto: the one that torch has loaded.",
    )

    usrbio_rings: int | None = Field(
        default=None, ge=1, le=64, description="Threads that read from 3FS, each with a ring of its own; auto: up to 4."
    )
    usrbio_depth: int = Field(
        default=16,
        ge=1,
        le=1024,
        description="Reads in flight on each ring; its buffer in /dev/shm takes 1.25 times as many io_bytes.",
    )
    usrbio_deadline_s: float = Field(
        default=90.0,
        gt=0,
        le=86400,
        description="Seconds without a byte after which a read from 3FS fails; 3FS itself tries for up to 60.",
    )
    hf3fs_lib_dir: str | None = Field(
        default=None,
        description="Where libhf3fs_api_shared.so is; auto: LD_LIBRARY_PATH, or beside the installed hf3fs_py_usrbio.",
    )

    object_store_requests: int = Field(
        default=16, ge=1, le=256, description="Requests to an object store in flight at once, each on a thread."
    )
    object_store_range_bytes: ByteSize = Field(
        default=ByteSize(8 * _MIB),
        ge=64 * _KIB,
        le=_GIB,
        description="The largest range of an object that one request asks for.",
    )
    object_store_timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        description="Seconds without a byte after which a request to an object store is sent again.",
    )
    object_store_endpoint_url: str | None = Field(
        default=None,
        pattern="^https?://[^/]",
        description="The object store's address; auto: AWS_ENDPOINT_URL, or that of AWS, Google or Azure.",
    )
    object_store_region: str | None = Field(
        default=None, description="The bucket's region; auto: AWS_REGION, AWS_DEFAULT_REGION, or us-east-1."
    )
    object_store_anonymous: bool = Field(
        default=False, description="Send requests unsigned, without looking for credentials: for public buckets."
    )
    object_store_virtual_host: bool = Field(
        default=False, description="Address buckets as https://bucket.host/key instead of https://host/bucket/key."
    )

    @field_validator(
        "threads",
        "usrbio_rings",
        "hf3fs_lib_dir",
        "device_runtime",
        "sharded_pattern",
        "weights_uri",
        "object_store_endpoint_url",
        "object_store_region",
        mode="before",
    )
    @classmethod
    def _auto_is_none(cls, value: Any) -> Any:
        return None if value == "auto" else value

    @field_validator("key_mapping", mode="before")
    @classmethod
    def _is_mapping(cls, value: Any) -> Any:
        if value is None or value in ("", "auto"):
            return None
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ValueError(f"this is no valid JSON: {error}") from None
        if isinstance(value, str) and _FUNCTION.fullmatch(value):
            return value
        if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
            raise ValueError(
                'this takes regular expressions with their replacements ({"^model[.]": ""}), or "module:function"'
            )
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return value

    @field_validator("sharded_pattern")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        from .formats.sharded_state import check_pattern

        return None if value is None else check_pattern(value)


class CompileCacheSettings(_Group):
    """How compile caches are shared (``compile_cache:`` in the YAML file)."""

    enabled: bool = Field(default=True, description="Restore compile caches before warm-up and save them after it.")
    read_only: bool = Field(default=False, description="Restore, but never save.")
    directory: str = Field(
        default="~/.cache/engine_loader/compile_cache",
        min_length=1,
        description="The store of compile caches: a directory that the fleet shares, or a prefix in an object store "
        "(s3://bucket/prefix, gs://, az://).",
    )
    scope: str | None = Field(
        default=None,
        max_length=200,
        description="Caches of one scope are restored together; auto: one for each model and parallel layout.",
    )
    key_file: str | None = Field(
        default=None, description="A secret that packs are signed with (HMAC-SHA256); what is not signed is refused."
    )
    trust: Literal["owner", "anyone"] = Field(
        default="owner",
        description="Without a key file: take only what nobody but this user and root may write (owner), or anything. "
        "Caches are code.",
    )
    fixups: bool = Field(
        default=True, description="Mend faults of known engine versions that keep a restored cache from being used."
    )
    restore_timeout_s: float = Field(
        default=60.0,
        gt=0,
        le=86400,
        description="Seconds after which an engine starts without a restore that is not done.",
    )
    save_timeout_s: float = Field(default=900.0, gt=0, le=86400, description="Seconds after which a save is given up.")
    lock_timeout_s: float = Field(
        default=30.0, ge=0, le=86400, description="Seconds to wait for another process of this node that saves."
    )
    unfinished_timeout_s: float = Field(
        default=3600.0,
        ge=0,
        description="Age in seconds at which an unfinished file counts as left over and is deleted.",
    )
    max_concurrent_saves: int = Field(
        default=50, ge=1, le=10000, description="A save is passed over while this many are being written to the store."
    )
    threads: int | None = Field(
        default=None, ge=1, le=256, description="Threads that compress and decompress; auto: one for each CPU."
    )
    compression_level: int = Field(default=3, ge=1, le=19, description="Of zstd, for packs.")
    max_pack_bytes: ByteSize = Field(
        default=ByteSize(4 * _GIB), ge=_MIB, le=_MOST_BYTES, description="A save that would be larger is given up."
    )
    min_local_free_bytes: ByteSize = Field(
        default=ByteSize(512 * _MIB), ge=0, le=_MOST_BYTES, description="What a restore leaves free on the local disk."
    )
    min_store_free_bytes: ByteSize = Field(
        default=ByteSize(512 * _MIB), ge=0, le=_MOST_BYTES, description="What a save leaves free in the store."
    )
    work_directory: str | None = Field(
        default=None,
        description="Where temporary files of restores and saves go; auto: the temporary directory.",
    )
    compact_packs: int = Field(
        default=12,
        ge=2,
        le=1000,
        description="When a key has more packs than this, a save puts them together into one.",
    )
    keep_days: float = Field(
        default=30.0, gt=0, description="Keys that were neither made nor used for longer are pruned."
    )
    keep_keys: int = Field(default=200, ge=1, description="The most keys that pruning leaves.")
    keep_bytes: ByteSize = Field(
        default=ByteSize(100 * _GIB), ge=_MIB, le=_MOST_BYTES, description="The most bytes that pruning leaves."
    )

    @field_validator("threads", "scope", "key_file", "work_directory", mode="before")
    @classmethod
    def _auto_is_none(cls, value: Any) -> Any:
        return None if value == "auto" else value


class Settings(_Group):
    """Everything that can be set."""

    debug: bool = Field(default=False, description="Log what a developer of this package wants to see.")
    loader: LoaderSettings = Field(default_factory=LoaderSettings)
    compile_cache: CompileCacheSettings = Field(default_factory=CompileCacheSettings)


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
class _Layer:
    """Values from one place, where in it each stands, and what was already found wrong with it.

    Attributes:
        prefix: what the reader of a message leaves out of a name there.
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

    def shown(self, dotted: str) -> str:
        """A setting's name as it is written in this layer."""
        return dotted.removeprefix(self.prefix)


def load_settings(
    extra_config: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    extra_origin: str = EXTRA_CONFIG,
) -> ResolvedSettings:
    """Read all layers. None as a value, and an empty variable, set nothing.

    Args:
        extra_config: the dictionary of ``--model-loader-extra-config``: keys of ``loader``.
        environ: instead of ``os.environ``.
        extra_origin: what messages and origins call the place of ``extra_config``.

    Raises:
        SettingsError: an unknown key or a bad value; it names the file and line or the variable, and what is valid.
            With several, one line for each.
    """
    environ = os.environ if environ is None else environ
    layers = [
        _yaml_layer(environ.get(CONFIG_VARIABLE)),
        _known_names_layer(environ),
        _environment_layer(environ),
        _extra_config_layer(extra_config or {}, extra_origin),
    ]
    problems = [problem for layer in layers for problem in _problems(layer)]
    if problems:
        raise SettingsError("\n".join(problems))
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        _merge(values, layer.values)
        origins.update((name, place) for name, place in layer.origins.items() if name in _fields())
    return ResolvedSettings(Settings(**values), origins)


def describe_settings() -> Iterator[tuple[str, str, str]]:
    """(dotted name, default, description) of every setting."""
    for name, default in _fields().items():
        yield name, show_value(default.value), default.description


def setting_value(settings: Settings, name: str) -> Any:
    """The value of the setting with the dotted ``name``."""
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def variable_name(name: str) -> str:
    """The environment variable that sets the setting with the dotted ``name``."""
    return PREFIX + name.replace(".", "__").upper()


def show_value(value: object) -> str:
    """A setting's value as a person writes it, in a form that can be given back."""
    if isinstance(value, ByteSize):
        for unit, name in ((1 << 40, "TiB"), (_GIB, "GiB"), (_MIB, "MiB"), (_KIB, "KiB")):
            if value and value % unit == 0:
                return f"{value // unit} {name}"
        return str(int(value))
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return json.dumps(value)
    return "auto" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class _Default:
    value: Any
    description: str


def _fields(group: type[BaseModel] = Settings, prefix: str = "") -> dict[str, _Default]:
    """Every setting by its dotted name."""
    found: dict[str, _Default] = {}
    for name, info in group.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found |= _fields(info.annotation, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = _Default(info.default, info.description or "")
    return found


def _groups() -> set[str]:
    return {name.rpartition(".")[0] for name in _fields() if "." in name}


def _yaml_layer(path: str | None) -> _Layer:
    layer = _Layer()
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
        raise SettingsError(_yaml_problem(path, error)) from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not valid YAML: it is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise SettingsError(f"{path} is not valid YAML: it contains itself, or is nested too deeply") from None
    return layer


def _read_mapping(node: yaml.MappingNode, path: str, prefix: str, layer: _Layer) -> None:
    """Put every value below ``node`` into the layer, with the line of its key."""
    seen: set[str] = set()
    for key_node, value_node in node.value:
        place = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            layer.problems.append(f"{place}: a setting's name is a word")
            continue
        key = str(key_node.value)
        if key in seen:
            layer.problems.append(f"{place}: {prefix}{key} is set twice")
            continue
        seen.add(key)
        if isinstance(value_node, yaml.MappingNode) and f"{prefix}{key}" in _groups():
            _read_mapping(value_node, path, f"{prefix}{key}.", layer)
            continue
        try:
            value = yaml.SafeLoader("").construct_object(value_node, deep=True)
        except (ValueError, yaml.YAMLError) as error:
            layer.problems.append(f"{place}: {prefix}{key}: {getattr(error, 'problem', None) or error}")
            continue
        # `threads:` with nothing behind it, as in a file whose values are commented out, sets nothing.
        if value is not None:
            layer.put(f"{prefix}{key}", value, place)


def _yaml_problem(path: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{path} is not valid YAML: {' '.join(str(error).split())}"
    what = [text for text in (getattr(error, "context", None), getattr(error, "problem", None)) if text]
    return f"{path}:{mark.line + 1}: not valid YAML: {', '.join(what)}"


def _known_names_layer(environ: Mapping[str, str]) -> _Layer:
    layer = _Layer()
    for variable, dotted in KNOWN_NAMES.items():
        value = environ.get(variable, "").strip()
        if value and variable.endswith("_MB"):
            value = f"{value} MiB" if value.isdigit() else value
        elif variable.startswith("FASTSAFETENSORS_"):
            value = value.lower()
        if value:
            layer.put(dotted, value, variable)
    return layer


def _environment_layer(environ: Mapping[str, str]) -> _Layer:
    layer = _Layer()
    for variable, value in environ.items():
        if not variable.startswith(PREFIX) or variable in _NOT_SETTINGS or not value.strip():
            continue
        dotted = variable.removeprefix(PREFIX).lower().replace("__", ".")
        if dotted in _fields():
            layer.put(dotted, value.strip(), variable)
        elif not _SERVICE_LINK.fullmatch(variable):
            near = _nearest(dotted, dotted.rpartition(".")[0], variable_name)
            layer.problems.append(f"{variable}: there is no such setting{near}")
    return layer


def _extra_config_layer(extra_config: Mapping[str, Any], origin: str) -> _Layer:
    layer = _Layer(prefix="loader.")
    for key, value in extra_config.items():
        if value is not None:
            layer.values.setdefault("loader", {})[str(key)] = value
            layer.origins[f"loader.{key}"] = origin
    return layer


def _merge(target: dict[str, Any], values: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in values.items():
        if f"{prefix}{key}" in _groups():
            _merge(target.setdefault(key, {}), value, f"{prefix}{key}.")
        else:
            target[key] = value


def _problems(layer: _Layer) -> Iterator[str]:
    """What is wrong with a layer, a line each."""
    yield from layer.problems
    try:
        Settings(**layer.values)
    except ValidationError as error:
        yield from dict.fromkeys(map(partial(_explain, layer=layer), error.errors()))


def _explain(problem: Any, layer: _Layer) -> str:
    dotted = ".".join(str(part) for part in problem["loc"])
    origin = layer.origins.get(dotted) or next(
        (place for name, place in layer.origins.items() if dotted.startswith(f"{name}.")), "settings"
    )
    shown = layer.shown(dotted)
    if problem["type"] == "extra_forbidden":
        group = layer.prefix.rstrip(".") or dotted.rpartition(".")[0]
        return f"{origin}: there is no setting {shown}{_nearest(dotted, group, layer.shown)}"
    if dotted in _groups():
        return f"{origin}: {shown} is a group of settings, not a setting: put them below it"
    given = repr(problem["input"])
    given = given if len(given) <= _SHOWN_CHARS else f"{given[:_SHOWN_CHARS]}…"
    return f"{origin}: {shown} = {given}: {str(problem['msg']).removeprefix('Value error, ')}"


def _nearest(dotted: str, group: str, show: Callable[[str], str]) -> str:
    """What may have been meant by ``dotted``, and what there is in its group, written as by ``show``."""
    group = group if group in _groups() else ""
    there = [name for name in (*_fields(), *sorted(_groups())) if name.rpartition(".")[0] == group]
    lasts = {name.rpartition(".")[2]: name for name in there}
    near = [lasts[last] for last in difflib.get_close_matches(dotted.removeprefix(f"{group}."), lasts, n=1)]
    if not near and not group:
        # A setting without its group: "threads" for "loader.threads".
        near = difflib.get_close_matches(dotted, _fields(), n=1)
    meant = f"; did you mean {show(near[0])}?" if near else ""
    return f"{meant} (there are: {', '.join(show(f'{name}.…' if name in _groups() else name) for name in there)})"
