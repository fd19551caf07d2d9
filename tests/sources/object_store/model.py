"""The checkpoint that tests read from a fault server, and what was right."""

from typing import Any

from engine_loader import open_checkpoint
from tests.support.checkpoints import checkpoint, entry, tensor_bytes

KIB = 1 << 10
KEY = "bucket/model.safetensors"
URL = f"s3://{KEY}"
TENSORS = {f"t{number}": entry("F32", [100, 100 + number], seed=number) for number in range(8)}
CONTENT = checkpoint(TENSORS)
RIGHT = {name: content for name, (_, _, content) in TENSORS.items()}
QUICK: dict[str, Any] = {"object_store_range_bytes": 64 * KIB, "max_tries": 2}
IMPATIENT = {"object_store_timeout_s": 0.5}
"""For servers that stall. With others, a machine that does would be taken for one."""


def load(**options: Any) -> dict[str, bytes]:
    """The bytes of every tensor."""
    with open_checkpoint(URL, **{**QUICK, **options}) as opened:
        return {name: tensor_bytes(tensor) for name, tensor in opened.tensors()}
