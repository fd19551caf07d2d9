"""The settings of an engine's start: how it goes faster, and what is told of it."""

from __future__ import annotations

from typing import Literal

from pydantic import ByteSize, Field

from .kinds import Auto, SettingsGroup, Size

_MIB, _GIB = 1 << 20, 1 << 30


class ReportSettings(SettingsGroup):
    """What is told of an engine's start (``report:`` in the YAML file)."""

    events: bool = Field(
        default=True, description="Write down when the phases of a start begin and end, for `engine-loader report`."
    )
    directory: str = Field(
        default="~/.cache/engine_loader/starts", min_length=1, description="Where, a directory for each start."
    )
    keep_starts: int = Field(default=10, ge=1, le=1000, description="How many starts are kept there.")
    stall_s: float = Field(
        default=20.0,
        ge=0,
        le=86400,
        description="Seconds without progress after which a start that hangs is told of; 0: never.",
    )
    metrics_file: Auto[str] = Field(
        default=None,
        description="A file (*.prom) for the textfile collector of Prometheus' node exporter, written when an engine "
        "is ready; auto: none.",
    )


class StartSettings(SettingsGroup):
    """How an engine's start goes faster (``start:`` in the YAML file)."""

    template: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Whether the engine process and the workers of `vllm serve` are forked from a copy of its first "
        "process, made before anything runs there, so that one import serves all: auto where that is tested (CPU), on "
        "also beside accelerators and in SGLang, off: each imports for itself.",
    )
    warm: Literal["auto", "off"] = Field(
        default="off",
        description="Whether weights that are not in the page cache are read into it while the engine imports, by a "
        "process of the lowest priority, as far as the cgroup and the machine have room; and into memory, where the "
        "load format b10_3fs will read them past the page cache.",
    )
    warm_bytes: Size = Field(
        default=ByteSize(8 * _GIB),
        ge=16 * _MIB,
        le=1024 * _GIB,
        description="With `warm: auto`, the most memory for weights that are read past the page cache (3FS, O_DIRECT, "
        "object stores): they are read into memory of a process, as far as the cgroup and the machine have room, until "
        "the loader takes them over.",
    )
    plan: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Whether vLLM keeps the size of the KV cache that it measured (VLLM_ENABLE_STARTUP_PLAN), so that "
        "later starts do not measure it: on; auto: the log says where that would help; off: nothing is said.",
    )
