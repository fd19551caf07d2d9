"""What a restore or a save is to do, in a form that can be given to another process."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..directories import ENGINES, VLLM_MODEL_INFOS, CacheRoot
from ..key import CacheKey
from ..unpacking.rank_sets import Layout

_LAYOUT = re.compile(r"_tp(?P<tp>\d+)_pp(?P<pp>\d+)_dp(?P<dp>\d+)$")


@dataclass(frozen=True)
class Job:
    """A restore or a save, in a form that can be given to another process.

    Attributes:
        engine: a key of directories.ENGINES.
        model_infos: only vLLM's descriptions of models, instead of everything else.
        directories: name of a cache -> where it is here.
        since_ns: when the engine's start began (nanoseconds since the epoch). A save takes files that came after it,
            and those in directories that the engine noted as in use; 0: all.
        engine_pid: the process that starts the engine for which this is restored; 0: a restore by hand, which is not
            put on trial.
        settle: wait until no process writes into the caches any more.
        background: with the lowest priority.
        layout: sizes of the engine's parallelism, as ``Layout`` takes them; empty: they are not known.
    """

    action: Literal["restore", "save"]
    engine: str
    key: CacheKey
    directories: Mapping[str, str]
    model_infos: bool = False
    since_ns: int = 0
    engine_pid: int = 0
    settle: bool = False
    background: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    layout: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"key": self.key.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Job:
        return cls(**{**value, "key": CacheKey.from_json(value["key"])})

    def ranks(self) -> Layout | None:
        """The engine's parallel layout; None where it is not known. A default scope ends with it."""
        found = _LAYOUT.search(self.key.scope)
        sizes = self.layout or ({name: int(size) for name, size in found.groupdict().items()} if found else {})
        if not sizes:
            return None
        tp, pp, dp = (sizes.get(name, 1) for name in ("tp", "pp", "dp"))
        return Layout(tp, pp, dp, dp_attention=bool(sizes.get("dp_attention")))

    def roots(self) -> tuple[CacheRoot, ...]:
        return (VLLM_MODEL_INFOS,) if self.model_infos else ENGINES[self.engine]

    def paths(self) -> dict[str, Path]:
        names = {root.name for root in self.roots()}
        return {name: Path(path) for name, path in self.directories.items() if name in names}

    def home(self) -> Path:
        """The cache whose state directory holds the locks."""
        return next(iter(self.paths().values()))
