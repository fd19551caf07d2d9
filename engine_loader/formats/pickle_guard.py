"""Rewrites a pickle so that reading it takes time and memory in proportion to its length.

Python's unpickler hashes the keys of dicts and the elements of sets, and the hash of a tuple visits all elements of
all tuples in it: 200 bytes, in which each tuple refers twice to the tuple before, take hours, and no signal comes
through. In the rewritten pickle, each tuple that may hold other tuples is handed to ``persistent_load`` when it is
made, which returns an object that is hashed by its identity. Tuples of up to three small integers, the sizes of
tensors, of which a checkpoint has very many, stay as they are. Opcodes are those of protocols 0 to 5
(``pickletools``).
"""

from __future__ import annotations

import re

_INTEGER = rb"(?:K.|M..|J...[\x00-\x7f])"
# Opcodes without arguments that neither end a pickle nor make a tuple, a set or an empty list.
_BARE = rb"[(01NRabdelsu)\x81\x88\x89\x90\x93\x94]"
# A tuple of one to three integers (made by opcodes 85, 86, 87), and a call with the tuple as its only argument.
_SIZE = _INTEGER + rb"(?:(?:\x85|" + _INTEGER + rb"(?:\x86|" + _INTEGER + rb"\x87))(?:\x94(?:\x85\x94R)?)?)?"
_FIXED = re.compile(
    rb"(?:" + _BARE + rb"*+(?:j.{4}|[hq\x80].|" + _SIZE + rb"|[}\]]\x94\(|J.{4}|G.{8}))*+" + _BARE + rb"*+",
    re.DOTALL,
)
_PUT = re.compile(rb"(?:\x94|q.|r.{4}|p[0-9]{1,10}\n)?", re.DOTALL)
# Bytes of the length that follows the opcode.
_COUNTS = dict.fromkeys(b"UC\x8c\x8a", 1) | dict.fromkeys(b"TBX", 4) | dict.fromkeys(b"\x8d\x8e\x96", 8)
# Lines that follow the opcode, and the most bytes of them: the time to parse a number grows with its square.
_LINES = dict.fromkeys(b"FILgp", (1, 32)) | dict.fromkeys(b"SV", (1, 1 << 30)) | {ord("c"): (2, 1 << 30)}
_STOP, _FRAME, _LONG_PUT, _TEXT_PUT, _LONG = b".\x95rp\x8a"
_TUPLES = frozenset(b"t\x85\x86\x87\x91")
_CONTAINERS = frozenset(b"]}\x8f")
_CONSUMERS = frozenset({b"R", b"\x81", b"b"})
_MOST_LONG_BYTES = 9
_FRAME_BYTES = 9
_FEW_CONTAINERS, _BYTES_PER_CONTAINER = 1024, 8


def guarded(content: bytes) -> bytes:
    """The pickle, rewritten.

    Its reader's ``persistent_load`` gets ``(value,)`` for a tuple or frozenset and returns what stands for the value,
    and ``(arguments, None)`` for the arguments of a call and returns the arguments.

    Raises:
        ValueError: the content is not a pickle, has an opcode that pickles of plain data do not have, gives an object a
            higher number than the content has bytes, or has more lists than its length accounts for.
    """
    return _Guard(content).rewritten()


class _Guard:
    def __init__(self, content: bytes) -> None:
        self._content = content
        self._pieces: list[bytes] = []
        self._kept = 0  # up to here, the content is in the pieces
        self._containers_left = _FEW_CONTAINERS + len(content) // _BYTES_PER_CONTAINER

    def rewritten(self) -> bytes:
        content, match, counts = self._content, _FIXED.match, _COUNTS
        at = 0
        while True:
            fixed = match(content, at)
            assert fixed is not None  # the expression also matches the empty string
            at = fixed.end()
            code = content[at] if at < len(content) else -1
            size = counts.get(code)
            if size is None:
                if code == _STOP:
                    break
                at = self._tuple(at) if code in _TUPLES else self._rare(code, at)
                continue
            begin = at + 1
            nbytes = int.from_bytes(content[begin : begin + size], "little")
            if code == _LONG and nbytes > _MOST_LONG_BYTES:
                raise ValueError(f"it has an integer of {nbytes} bytes")
            at = begin + size + nbytes
        self._keep(at + 1)
        body = b"".join(self._pieces)
        # One frame around all: the unpickler reads what is outside of frames byte by byte.
        return b"\x95" + len(body).to_bytes(8, "little") + body

    def _rare(self, code: int, at: int) -> int:
        """The position after a list, a frame, or an opcode that few pickles have."""
        content, begin = self._content, at + 1
        if code in _CONTAINERS:
            self._count()
            return begin
        if code == _FRAME:
            self._keep(at)
            self._kept = at + _FRAME_BYTES
            return self._kept
        if code == _LONG_PUT:
            self._check_number(int.from_bytes(content[begin : begin + 4], "little"))
            return begin + 4
        if code not in _LINES:
            raise ValueError("it ends too early" if code < 0 else f"it has the unknown opcode {code}")
        lines, most = _LINES[code]
        end = begin
        for _ in range(lines):
            end = content.index(b"\n", end) + 1
        if end - begin > most:
            raise ValueError(f"it has a number of {end - begin} characters")
        if code == _TEXT_PUT:
            self._check_number(int(content[begin : end - 1]))
        return end

    def _tuple(self, at: int) -> int:
        """The position after a tuple, which is rewritten.

        What a call or an object takes at once stays a tuple, but no later opcode gets it: its number goes to None.
        """
        self._count()
        content, end = self._content, at + 1
        if content[end : end + 1] == b"\x94":
            end += 1
        else:
            put = _PUT.match(content, end)
            assert put is not None  # the expression also matches the empty string
            end = put.end()
        consumer = content[end : end + 1]
        if consumer not in _CONSUMERS:
            self._pieces += (content[self._kept : at + 1], b"\x85Q")
            self._kept = at + 1
            return at + 1
        number = content[at + 1 : end]
        self._check_put(number)
        arguments = b"" if consumer == b"b" else b"N\x86Q"
        self._pieces += (content[self._kept : at + 1], arguments, b"N" + number + b"0" if number else b"")
        self._kept = end
        return end

    def _check_put(self, put: bytes) -> None:
        if put[:1] == b"r":
            self._check_number(int.from_bytes(put[1:], "little"))
        elif put[:1] == b"p":
            self._check_number(int(put[1:]))

    def _keep(self, end: int) -> None:
        self._pieces.append(self._content[self._kept : end])
        self._kept = end

    def _count(self) -> None:
        self._containers_left -= 1
        if self._containers_left < 0:
            raise ValueError("it has more lists and tuples than the metadata of a checkpoint of its length")

    def _check_number(self, number: int) -> None:
        if number > len(self._content):
            raise ValueError(f"it gives an object the number {number}, but has only {len(self._content)} bytes")
