"""The device, and the stream of it, that own the destinations of a transfer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceStream:
    """A device whose memory holds a transfer's destinations, and the stream that used them last.

    Attributes:
        device: its number in the runtime of CUDA or HIP.
        stream: a ``cudaStream_t`` as an integer; 0 is the default stream.
    """

    device: int
    stream: int = 0
