"""Finds out, before a pickle is read, whether it numbers its objects beyond all reason.

Python's unpickler keeps an array of as many places as the highest number that a pickle gives to an object, so that ten
bytes of it can take all of a machine's memory. Opcodes are those of protocols 0 to 5 (``pickletools``).
"""

from __future__ import annotations

import re

# Opcodes with arguments of 0, then of 1, 4, 2 and 8 bytes, but for the end and for those that number objects. A run of
# those without arguments is one step.
_BARE = rb"[(012NQRabdelostu)\]}\x81\x85-\x89\x8f-\x94\x97\x98]*+"
_FIXED = re.compile(rb"(?:" + _BARE + rb"(?:[Khq\x80\x82].|[Jj\x84].{4}|[M\x83]..|[G\x95].{8}))*+" + _BARE, re.DOTALL)
_COUNTS = dict.fromkeys(b"UC\x8c\x8a", 1) | dict.fromkeys(b"TBX\x8b", 4) | dict.fromkeys(b"\x8d\x8e\x96", 8)
_LINES = dict.fromkeys(b"FILSVgpP", 1) | dict.fromkeys(b"ci", 2)
_STOP, _PUT, _LONG_PUT = b".pr"


def check_memo(content: bytes) -> None:
    """Refuse a pickle that numbers an object higher than it has bytes.

    Raises:
        ValueError: it does, or is no pickle.
    """
    place = 0
    while True:
        fixed = _FIXED.match(content, place)
        assert fixed is not None  # it matches nothing, too
        place = fixed.end()
        code = content[place] if place < len(content) else -1
        begin = place + 1
        if code == _STOP:
            return
        if code in _COUNTS:
            size = _COUNTS[code]
            place = begin + size + int.from_bytes(content[begin : begin + size], "little")
        elif code == _LONG_PUT:
            _check(int.from_bytes(content[begin : begin + 4], "little"), content)
            place = begin + 4
        elif code in _LINES:
            place = begin
            for _ in range(_LINES[code]):
                place = content.index(b"\n", place) + 1
            if code == _PUT:
                _check(int(content[begin : place - 1]), content)
        else:
            raise ValueError("it ends too early" if code < 0 else f"it has the unknown opcode {code}")


def _check(number: int, content: bytes) -> None:
    if number > len(content):
        raise ValueError(f"it gives an object the number {number}, but has only {len(content)} bytes")
