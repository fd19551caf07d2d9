"""A manifest is read, or refused with one kind of error, whatever it says."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.compile_cache.cache_errors import CacheValidationError
from engine_loader.compile_cache.packs.manifest import Frame, Manifest, PackedFile, unsafe_link, unsafe_path
from engine_loader.compile_cache.packs.tar import padding
from tests.compile_cache.support import KEY

FILES = (
    PackedFile("inductor/ab/k.so", 5, 10**18, 0o644, "0" * 64, 0, 0),
    PackedFile("triton/l", 0, 7, 0o777, "", 1, 0, "k"),
)


def sizes(file: PackedFile) -> int:
    return len(file.head()) + file.size + padding(file.size)


SOUND = Manifest(KEY, 1.5, FILES, (Frame(0, 10, sizes(FILES[0]), "1" * 64), Frame(10, 9, sizes(FILES[1]), "2" * 64)))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


DOCUMENT = json.loads(SOUND.to_json())


def test_a_sound_one_survives() -> None:
    assert Manifest.from_json(SOUND.to_json(), "here") == SOUND


@given(place=st.sampled_from(places(DOCUMENT)), value=JSON)
def test_any_other_value_is_read_or_refused(place: tuple[Any, ...], value: Any) -> None:
    document = json.loads(SOUND.to_json())
    parent = document
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    try:
        Manifest.from_json(json.dumps(document).encode(), "here")
    except CacheValidationError as error:
        assert str(error).startswith("here: ")


@given(st.binary(max_size=64))
def test_any_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(CacheValidationError):
        Manifest.from_json(content, "here")


@given(st.text(max_size=20))
def test_a_path_that_is_taken_stays_in_its_cache(path: str) -> None:
    if unsafe_path(path) is None:
        assert not path.startswith("/")
        assert ".." not in path.split("/")
        path.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("path", "target", "safe"),
    [
        ("inductor/a/b", "c", True),
        ("inductor/a/b", "c/d/./e", True),
        ("inductor/a/b", "../c", False),
        ("inductor/a/b", "../../c", False),
        ("inductor/b", "../c", False),
        ("inductor/a/b", "x/../../../c", False),
        ("inductor/a/b/c", "../..", False),
        ("inductor/out", "a/b/c/../..", False),
        ("inductor/a/b", "/etc/passwd", False),
        ("inductor/a/b", "a\0b", False),
    ],
)
def test_a_link_stays_in_its_directory(path: str, target: str, safe: bool) -> None:
    assert (unsafe_link(path, target) is None) == safe
