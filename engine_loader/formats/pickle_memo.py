"""Checks, before a pickle is read, that the numbers that it gives to objects (its memo) are not too high.

Python's unpickler allocates an array with one entry for every number up to the highest that a pickle gives to an
object: a pickle of ten bytes can take all memory of a machine. Opcodes are those of protocols 0 to 5
(``pickletools``).
"""

from __future__ import annotations

import re

# Opcodes with arguments of 0, then of 1, 4, 2 and 8 bytes, without the opcode that ends a pickle and those that number
# objects. A run of opcodes without arguments is one step of the expression.
_BARE = rb"[(012NQRabdelostu)\]}\x81\x85-\x89\x8f-\x94\x97\x98]*+"
_FIXED = re.compile(rb"(?:" + _BARE + rb"(?:[Khq\x80\x82].|[Jj\x84].{4}|[M\x83]..|[G\x95].{8}))*+" + _BARE, re.DOTALL)
_COUNTS = dict.fromkeys(b"UC\x8c\x8a", 1) | dict.fromkeys(b"TBX\x8b", 4) | dict.fromkeys(b"\x8d\x8e\x96", 8)
_LINES = dict.fromkeys(b"FILSVgpP", 1) | dict.fromkeys(b"ci", 2)
_STOP, _PUT, _LONG_PUT = b".pr"


def check_memo(content: bytes) -> None:
    """Refuse a pickle that gives an object a higher number than the pickle has bytes.

    Raises:
        ValueError: a number is too high, or the content is not a pickle.
    """
    at = 0
    while True:
        fixed = _FIXED.match(content, at)
        assert fixed is not None  # the expression also matches the empty string
        at = fixed.end()
        code = content[at] if at < len(content) else -1
        begin = at + 1
        if code == _STOP:
            return
        if code in _COUNTS:
            size = _COUNTS[code]
            at = begin + size + int.from_bytes(content[begin : begin + size], "little")
        elif code == _LONG_PUT:
            _check(int.from_bytes(content[begin : begin + 4], "little"), content)
            at = begin + 4
        elif code in _LINES:
            at = begin
            for _ in range(_LINES[code]):
                at = content.index(b"\n", at) + 1
            if code == _PUT:
                _check(int(content[begin : at - 1]), content)
        else:
            raise ValueError("it ends too early" if code < 0 else f"it has the unknown opcode {code}")


def _check(number: int, content: bytes) -> None:
    if number > len(content):
        raise ValueError(f"it gives an object the number {number}, but has only {len(content)} bytes")
