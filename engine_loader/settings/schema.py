"""The settings: every group with its values, their types and limits, defaults and meaning.

To add a setting, add a field here: the YAML file, the environment, messages and ``engine-loader settings`` follow.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, field_validator

from ..formats.sharded_state import check_pattern
from .kinds import Auto, SettingsGroup, Size
from .layout_names import LAYOUT_NAME
from .start_groups import ReportSettings, StartSettings

_FUNCTION = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")
_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
_MOST_BYTES = 1 << 50

_Threads = Annotated[int, Field(ge=1, le=256)]


class LoaderSettings(SettingsGroup):
    """How weights are read (``loader:`` in the YAML file; also the keys of ``--model-loader-extra-config``)."""

    backend: Literal["auto", "posix", "usrbio", "object_store"] = Field(
        default="auto",
        description="Where the files are read from: posix is any mounted file system, usrbio is 3FS past its mount, "
        "object_store is S3, Google Cloud Storage and Azure; auto is object_store for URLs (s3://, gs://, az://), "
        "usrbio for files on 3FS where its library is found, else posix.",
    )
    weights_uri: Auto[Annotated[str, Field(max_length=2000)]] = Field(
        default=None,
        description="Where an engine reads a model's weights, in place of its directory, which keeps configuration and "
        "tokenizer: s3://bucket/prefix, gs://, az://, or a path; auto: the model's directory.",
    )
    key_mapping: dict[str, str | None] | list[dict[str, Any]] | str | None = Field(
        default=None,
        description="Of a training checkpoint (torch.distributed.checkpoint), its names -> the model's: regular "
        'expression -> replacement, or null to leave tensors out (JSON: {"^model[.]": "", "^ema[.]": null}), or a '
        'Python function as "module:function"; or what also reorders, cuts and joins tensors: rules, or the name of a '
        "layout: torchtitan-llama (:128 for the rows of a head), meta-llama, torchtune-llama, torchtitan-llama4, "
        "torchtitan-qwen3, "
        "torchtitan-deepseek_v3; auto: as they are.",
    )
    mode: Literal["auto", "direct", "stream"] = Field(
        default="auto",
        description="How weights reach the model: read straight into its parameters, only what this rank keeps "
        "(direct), or handed to the engine as whole tensors (stream); auto is direct where that can serve.",
    )
    sharded_pattern: Auto[Annotated[str, Field(max_length=200)]] = Field(
        default=None,
        description="Names of the files of a sharded_state checkpoint, with {rank} (or {tp_rank}), {pp_rank} and "
        "{part}; auto: vLLM's, where the directory has such files.",
    )
    engine: Literal["auto", "cpp", "python", "mock"] = Field(
        default="auto",
        description="Which reader threads move the bytes: native ones (cpp) or Python's; mock is python.",
    )
    read_mode: Literal["auto", "buffered", "direct", "mapped"] = Field(
        default="auto",
        description="How a file is read: through the page cache (buffered), past it (O_DIRECT), or as mapped pages; "
        "auto picks by file system and by what lies in the page cache.",
    )
    threads: Auto[_Threads] = Field(
        default=None, description="Reader threads; auto: as many as the CPUs and the source can use."
    )
    ranks_per_node: Auto[Annotated[int, Field(ge=1, le=1024)]] = Field(
        default=None,
        description="Processes of this machine that load at the same time and share its CPUs; auto: LOCAL_WORLD_SIZE, "
        "or as many ranks of torch.distributed as can be on one machine.",
    )
    share: Literal["auto", "off"] = Field(
        default="off",
        description="Whether the ranks of a machine read once what several of them need, and copy it from memory that "
        "they share: auto where an engine has several ranks here and files are read past the page cache; off: each "
        "reads for itself.",
    )
    share_bytes: Size = Field(
        default=ByteSize(2 * _GIB),
        ge=16 * _MIB,
        le=64 * _GIB,
        description="The most memory that ranks share while they load, for all of a machine together.",
    )
    share_timeout_s: float = Field(
        default=5.0,
        gt=0,
        le=3600,
        description="Seconds after which a rank reads by itself what another one was to read for it.",
    )

    buffer_bytes: Size = Field(
        default=ByteSize(512 * _MIB),
        ge=_MIB,
        le=_MOST_BYTES,
        description="Memory for tensors on their way; a tensor that is larger gets its own.",
    )
    block_bytes: Size = Field(
        default=ByteSize(16 * _MIB),
        ge=64 * _KIB,
        le=_MOST_BYTES,
        description="Consecutive tensors are streamed in blocks of up to this size.",
    )
    io_bytes: Auto[Annotated[Size, Field(ge=4 * _KIB, le=_GIB)]] = Field(
        default=None,
        description="The largest single read; auto: 4 MiB, 1.5 MiB by O_DIRECT from a disk of this machine.",
    )
    max_tries: int = Field(
        default=5, ge=1, le=100, description="Tries of a read whose error may pass (EIO, ESTALE, …)."
    )
    deadline_s: float = Field(
        default=120.0, gt=0, allow_inf_nan=False, description="Seconds without a single byte after which a load fails."
    )

    device_pinned_bytes: Size = Field(
        default=ByteSize(256 * _MIB),
        ge=_MIB,
        le=_MOST_BYTES,
        description="Page-locked memory for what is on its way to a GPU, for each one that is read to.",
    )
    device_buffer_bytes: Size = Field(
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
    device_runtime: Auto[str] = Field(
        default=None,
        description="The library of CUDA's (or HIP's) runtime; auto: the one that torch has loaded.",
    )

    usrbio_rings: Auto[Annotated[int, Field(ge=1, le=64)]] = Field(
        default=None, description="Reader threads for 3FS, each with a ring of its own; auto: up to 4."
    )
    usrbio_depth: int = Field(
        default=16,
        ge=1,
        le=1024,
        description="Reads in flight on each ring; its buffer in /dev/shm takes 1.25 times as many io_bytes.",
    )
    usrbio_io_depth: int = Field(
        default=-1,
        ge=-1024,
        le=-1,
        description="Minus the reads that the daemon of 3FS carries out as one job, which complete together; "
        "-1: each by itself; -4 to -16 where its batch_io_coros are too few.",
    )
    usrbio_deadline_s: float = Field(
        default=90.0,
        gt=0,
        le=86400,
        description="Seconds without a byte after which a read from 3FS fails; 3FS itself tries for up to 60.",
    )
    hf3fs_lib_dir: Auto[str] = Field(
        default=None,
        description="Where libhf3fs_api_shared.so is; auto: LD_LIBRARY_PATH, or beside the installed hf3fs_py_usrbio.",
    )

    object_store_requests: int = Field(
        default=16, ge=1, le=256, description="Requests to an object store in flight at once, each on a thread."
    )
    object_store_range_bytes: Size = Field(
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
    object_store_endpoint_url: Auto[Annotated[str, Field(pattern="^https?://[^/]")]] = Field(
        default=None,
        description="The object store's address; auto: AWS_ENDPOINT_URL, or that of AWS, Google or Azure.",
    )
    object_store_region: Auto[str] = Field(
        default=None, description="The bucket's region; auto: AWS_REGION, AWS_DEFAULT_REGION, or us-east-1."
    )
    object_store_anonymous: bool = Field(
        default=False, description="Send requests unsigned, without looking for credentials: for public buckets."
    )
    cache_directory: Auto[Annotated[str, Field(min_length=1, max_length=2000)]] = Field(
        default=None,
        description="A directory on a disk of this node where what is read of object stores is kept for the next "
        "start, by ETag and size; auto: nothing is kept.",
    )
    cache_bytes: Auto[Annotated[Size, Field(ge=_MIB, le=_MOST_BYTES)]] = Field(
        default=None,
        description="How many bytes are kept there, about; the object that was used least recently goes first. auto: "
        "what the disk has room for, but for a twentieth of it.",
    )
    object_store_virtual_host: bool = Field(
        default=False, description="Address buckets as https://bucket.host/key instead of https://host/bucket/key."
    )

    @field_validator("key_mapping", mode="before")
    @classmethod
    def _is_mapping(cls, value: Any) -> Any:
        if value is None or value in ("", "auto"):
            return None
        if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ValueError(f"this is not valid JSON: {error}") from None
        if isinstance(value, str) and (_FUNCTION.fullmatch(value) or LAYOUT_NAME.fullmatch(value)):
            return value
        if isinstance(value, list):
            return value  # rules: loading.mapping reads them
        if not isinstance(value, dict) or not all(
            isinstance(pattern, str) and isinstance(text, str | None) for pattern, text in value.items()
        ):
            raise ValueError(
                'this takes regular expressions with their replacements ({"^model[.]": ""}), or "module:function"; '
                "null in place of a replacement leaves tensors out"
            )
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return value

    @field_validator("sharded_pattern")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        return None if value is None else check_pattern(value)


class CompileCacheSettings(SettingsGroup):
    """How compile caches are shared (``compile_cache:`` in the YAML file)."""

    enabled: bool = Field(default=True, description="Restore compile caches before warm-up and save them after it.")
    read_only: bool = Field(default=False, description="Restore, but never save.")
    directory: str = Field(
        default="~/.cache/engine_loader/compile_cache",
        min_length=1,
        description="The store of compile caches: a directory that the fleet shares, or a prefix in an object store "
        "(s3://bucket/prefix, gs://, az://).",
    )
    scope: Auto[Annotated[str, Field(max_length=200)]] = Field(
        default=None,
        description="Caches of one scope are restored together; auto: one for each model and parallel layout.",
    )
    store_name: Auto[Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]] = Field(
        default=None,
        description="The name of the store, which its marker says and every signature covers; a store of another "
        "name is refused. auto: the name that the store has.",
    )
    key_file: Auto[str] = Field(
        default=None,
        description="A file with keys, one a line: the first that can sign signs packs, and all verify; what is not "
        "signed by one of them is refused. A line is a secret (HMAC-SHA256) or an Ed25519 key; `engine-loader "
        "compile-cache keygen` makes both.",
    )
    public_keys: Auto[str] = Field(
        default=None,
        description="Ed25519 keys that verify packs and cannot sign any (ed25519-public:…), a list; for nodes that "
        "only restore.",
    )
    max_pack_age_days: Auto[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default=None, description="Packs that were made longer ago are refused; auto: age does not count."
    )
    trust: Literal["owner", "anyone"] = Field(
        default="owner",
        description="Without keys: take only what this user and root alone may write (owner), or anything (anyone); "
        "of local caches, with keys, too. Caches are code.",
    )
    fixups: bool = Field(
        default=True, description="Repair faults of known engine versions that keep a restored cache from being used."
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
    threads: Auto[_Threads] = Field(
        default=None, description="Threads that compress and decompress; auto: one for each CPU."
    )
    compression_level: int = Field(default=3, ge=1, le=19, description="Of zstd, for packs.")
    max_pack_bytes: Size = Field(
        default=ByteSize(4 * _GIB), ge=_MIB, le=_MOST_BYTES, description="A save that would be larger is given up."
    )
    min_local_free_bytes: Size = Field(
        default=ByteSize(512 * _MIB), ge=0, le=_MOST_BYTES, description="What a restore leaves free on the local disk."
    )
    min_store_free_bytes: Size = Field(
        default=ByteSize(512 * _MIB), ge=0, le=_MOST_BYTES, description="What a save leaves free in the store."
    )
    work_directory: Auto[str] = Field(
        default=None,
        description="Where temporary files of restores and saves go; auto: the temporary directory.",
    )
    compact_packs: int = Field(
        default=3,
        ge=2,
        le=1000,
        description="When a key has more packs than this, a save puts them together; one that is far larger than the "
        "others stays as it is.",
    )
    keep_days: float = Field(
        default=30.0, gt=0, description="Keys that were neither made nor used for longer are pruned."
    )
    keep_keys: int = Field(default=200, ge=1, description="The most keys that pruning leaves.")
    keep_bytes: Size = Field(
        default=ByteSize(100 * _GIB), ge=_MIB, le=_MOST_BYTES, description="The most bytes that pruning leaves."
    )

    @field_validator("public_keys", mode="before")
    @classmethod
    def _is_list(cls, value: Any) -> Any:
        if isinstance(value, list) and all(isinstance(key, str) for key in value):
            return " ".join(value) or None
        return value


class Settings(SettingsGroup):
    """Everything that can be set."""

    debug: bool = Field(default=False, description="Log what a developer of this package wants to see.")
    loader: LoaderSettings = Field(default_factory=LoaderSettings)
    compile_cache: CompileCacheSettings = Field(default_factory=CompileCacheSettings)
    report: ReportSettings = Field(default_factory=ReportSettings)
    start: StartSettings = Field(default_factory=StartSettings)
