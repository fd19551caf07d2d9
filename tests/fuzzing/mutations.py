"""Changes of sound inputs, as damage and as malice make them."""

import random

_MOST_BYTES = 1 << 20
_TOKENS = [b"[", b"{", b"]", b"}", b"(", b"t", b"\x85", b"\x86", b"\x94", b"\x8f", b"\x90", b"\x91", b"R", b"s", b"u"]
_TOKENS += [b"h\0", b"h\1", b"K\1", b"Q", b"2", b".", b"\x8a\xff", b"j\0\0\0\0", b"1e999", b"-1", b'"a":', b"\\ud800"]
_TOKENS += [b"9" * 30, b"\xff" * 8, b"PK\3\4", b"PK\1\2", b"NaN", b"null", b"../"]


def mutated(seeds: list[bytes], chance: random.Random) -> bytes:
    """One of the seeds after one to eight changes; at most 1 MiB."""
    content = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, 8)):
        _CHANGES[chance.randrange(len(_CHANGES))](content, seeds, chance)
    return bytes(content[:_MOST_BYTES])


def _flip(content: bytearray, seeds: list[bytes], chance: random.Random) -> None:
    if content:
        content[chance.randrange(len(content))] = chance.randrange(256)


def _cut(content: bytearray, seeds: list[bytes], chance: random.Random) -> None:
    begin, end = _span(content, chance)
    del content[begin:end]


def _repeat(content: bytearray, seeds: list[bytes], chance: random.Random) -> None:
    begin, end = _span(content, chance)
    content[begin:begin] = content[begin:end] * chance.choice((1, 2, 60, 2000))
    del content[_MOST_BYTES:]


def _insert(content: bytearray, seeds: list[bytes], chance: random.Random) -> None:
    at = chance.randint(0, len(content))
    content[at:at] = chance.choice(_TOKENS) * chance.choice((1, 1, 2, 100, 100_000))
    del content[_MOST_BYTES:]


def _splice(content: bytearray, seeds: list[bytes], chance: random.Random) -> None:
    other = chance.choice(seeds)
    begin, end = _span(other, chance)
    at = chance.randint(0, len(content))
    content[at:at] = other[begin:end]


def _span(content: bytes | bytearray, chance: random.Random) -> tuple[int, int]:
    begin = chance.randint(0, len(content))
    return begin, min(len(content), begin + chance.choice((1, 2, 4, 16, 64)))


_CHANGES = (_flip, _cut, _repeat, _insert, _splice)
