"""The safetensors header: what is wrong with a file is said, with its name, and in words."""

import json
import re
from typing import Any

import pytest

from engine_loader.errors import CheckpointError
from engine_loader.formats.safetensors import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    header_length,
    parse_header,
)
from tests.support.checkpoints import checkpoint, encode, entry

FILE = "/models/weights.safetensors"
U8 = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


def parse(content: bytes) -> Header:
    end = LENGTH_BYTES + header_length(content[:LENGTH_BYTES], len(content), FILE)
    return parse_header(content[LENGTH_BYTES:end], len(content), FILE)


def refusal(content: bytes) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        parse(content)
    assert str(caught.value).startswith(FILE)
    assert len(str(caught.value)) < 1000
    return caught.value


def with_entry(text: str, data: bytes = b"ab") -> bytes:
    return encode(f'{{"a":{text}}}', data)


def test_tensors_come_in_the_order_of_their_offsets_with_absolute_offsets():
    content = encode(
        {
            "late": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
            "early": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        },
        b"abc" + b"\0" * 8,
    )
    header = parse(content)
    start = len(content) - 11
    assert header.tensors == (
        TensorInfo("early", "U8", (3,), FILE, start, 3),
        TensorInfo("late", "F32", (2,), FILE, start + 3, 8),
    )
    assert header.file_bytes == len(content)


def test_metadata_is_kept_apart_from_the_tensors():
    header = parse(checkpoint({"a": entry("U8", [2])}, {"format": "pt", "é": "ü"}))
    assert header.metadata == {"format": "pt", "é": "ü"}
    assert [info.name for info in header.tensors] == ["a"]


@pytest.mark.parametrize("metadata", ["", '"__metadata__":null,'])
def test_a_file_may_have_no_metadata(metadata):
    assert parse(encode(f'{{{metadata}"a":{json.dumps(U8)}}}', b"ab")).metadata == {}


@pytest.mark.parametrize("name", ["", "a.b/c d", "\0", "模型", "\N{GRINNING FACE}", "__metadata"])
def test_a_name_may_be_any_text(name):
    assert parse(encode({name: U8}, b"ab")).tensors[0].name == name


@pytest.mark.parametrize("text", [' \n\t\r{"a":%s}', '{"a":%s} \n\t\r', '{\n  "a" :\t%s\r\n}'])
def test_white_space_around_the_header_is_no_error(text):
    assert len(parse(encode(text % json.dumps(U8), b"ab")).tensors) == 1


def test_fields_that_the_format_does_not_know_are_left_alone():
    assert (
        len(parse(with_entry('{"dtype":"U8","shape":[2],"data_offsets":[0,2],"note":{"x":[1.5,null]}}')).tensors) == 1
    )


def test_a_file_without_tensors_is_a_file():
    assert parse(encode("{}")).tensors == ()


def test_an_empty_file_is_named_as_such():
    assert "empty" in refusal(b"").message


@pytest.mark.parametrize("nbytes", [1, 7])
def test_a_file_without_room_for_the_length_is_too_short(nbytes):
    error = refusal(b"\x10" * nbytes)
    assert f"{nbytes} bytes are too short" in error.message


def test_a_file_that_is_cut_in_its_header_says_how_much_is_missing():
    content = checkpoint({"a": entry("U8", [2])})
    error = refusal(content[:20])
    assert re.search(r"header claims \d+ bytes, but the file ends after 20", error.message)
    assert "copy or download it again" in error.hint


@pytest.mark.parametrize("length", [2**62, 2**63, 2**64 - 1, MAX_HEADER_BYTES + 1])
def test_an_absurd_header_length_is_refused_before_anything_is_read(length):
    error = refusal(encode(b"{}", length=length))
    assert f"claims {length} bytes, more than the {MAX_HEADER_BYTES}" in error.message


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00data.pkl", "zip file"),
        (b"PK\x03\x04\x00\x00\x00\x00\x00\x00\x00\x00data.pkl", "zip file"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "this is an HTML page, perhaps the error page"),
        (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "this is XML or another text"),
        (b'{"error": "Repository not found"}', "this is JSON, as a config.json or a server's error is"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", "not a safetensors file"),
    ],
    ids=["git-lfs", "zip", "zip-version-0", "html", "xml", "json", "numpy"],
)
def test_what_is_no_safetensors_file_is_called_what_it_is(content, hint):
    assert hint in str(refusal(content))


def test_the_cause_is_named_first():
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    for content, cause in (
        (pointer, "this is a git-lfs pointer"),
        (b"GGUF\3\0\0\0" + b"x" * 90, "this is a GGUF file"),
    ):
        assert refusal(content).message.startswith(cause)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"   ",
        b"null x",
        b"{",
        b'{"a":}',
        b"{'a':1}",
        b'{"a":1,}',
        b"{}{}",
        b"{}\0",
        b"\0{}",
        b'{"\x01":1}',
        b"\x0c{}",
    ],
)
def test_a_header_that_is_not_json_says_where(text):
    assert "not valid JSON" in refusal(encode(text)).message


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 400, "1" * 5000, "-" + "1" * 5000, "01"]
)
def test_numbers_that_are_not_json_are_refused_even_where_nobody_reads_them(number):
    error = refusal(with_entry(f'{{"dtype":"U8","shape":[2],"data_offsets":[0,2],"x":{number}}}'))
    assert "not valid JSON" in error.message


@pytest.mark.parametrize("text", ["[]", '"a"', "1", "null", "true"])
def test_a_header_that_is_no_object_is_refused(text):
    assert "not a JSON object" in refusal(encode(text)).message


def test_a_header_that_is_not_utf8_says_at_which_byte():
    error = refusal(encode(b'{"\xff":1}'))
    assert "not UTF-8" in error.message
    assert error.offset == LENGTH_BYTES + 2


@pytest.mark.parametrize("text", ['{"\ud800":1}', "\ufeff{}"], ids=["surrogate", "byte-order-mark"])
def test_text_that_only_some_decoders_take_is_refused(text):
    assert re.search("not UTF-8|not valid JSON", refusal(encode(text)).message)


@pytest.mark.parametrize(
    "text",
    [
        '{"\\ud800":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"x":["\\udc00"]}}',
        '{"__metadata__":{"x":"\\ud800"},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        '{"__metadata__":{"\\ud83d":"x"},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
    ],
    ids=["name", "unknown-field", "metadata-value", "metadata-key"],
)
def test_half_of_a_surrogate_pair_is_no_text(text):
    assert "surrogate" in refusal(encode(text, b"ab")).message


def test_a_whole_surrogate_pair_is_text():
    assert (
        parse(encode('{"\\ud83d\\ude00":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"ab")).tensors[0].name
        == "😀"
    )


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_nesting_without_end_is_refused(opening):
    assert "not valid JSON" in refusal(encode(opening * 100_000)).message


@pytest.mark.parametrize("field", ["shape", "dtype", "data_offsets"])
@pytest.mark.parametrize("depth", [100, 900, 960, 980])
def test_nesting_as_deep_as_python_can_go_is_refused_in_a_few_words(field, depth):
    deep = json.loads(json.dumps(U8))
    text = json.dumps({**deep, field: "HERE"}).replace('"HERE"', "[" * depth + "]" * depth)
    refusal(with_entry(text))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"a":1,"a":1}', "'a'"),
        ('{"a":{"dtype":"U8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}', "'dtype'"),
        ('{"__metadata__":{},"__metadata__":{}}', "'__metadata__'"),
        ('{"__metadata__":{"k":"1","k":"2"}}', "'k'"),
        ('{"a":1,"\\u0061":1}', "'a'"),
    ],
    ids=["name", "in-an-entry", "metadata", "in-metadata", "escaped"],
)
def test_a_key_that_stands_twice_is_named(text, key):
    assert f"the header has {key} twice" in refusal(encode(text)).message


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("1", "__metadata__ is not an object of strings: 1"),
        ('"x"', "__metadata__ is not an object of strings: 'x'"),
        ("[]", "__metadata__ is not an object of strings: []"),
        ('{"k":"v","a":1}', "'a' in __metadata__ is not a string: 1"),
        ('{"a":null}', "'a' in __metadata__ is not a string: None"),
        ('{"a":{}}', "'a' in __metadata__ is not a string: {}"),
    ],
)
def test_metadata_must_be_strings(value, said):
    assert refusal(encode(f'{{"__metadata__":{value}}}')).message == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1", "is not an object: 1"),
        ("null", "is not an object: None"),
        ("[]", "is not an object: []"),
        ('["U8",[2],[0,2]]', "is not an object: ['U8', [2], [0, 2]]"),
        ("{}", "has no dtype and no shape and no data_offsets"),
        ('{"dtype":"U8","shape":[2]}', "has no data_offsets"),
        ('{"dtype":"U8","data_offsets":[0,2]}', "has no shape"),
        ('{"shape":[2],"data_offsets":[0,2]}', "has no dtype"),
    ],
)
def test_an_entry_needs_dtype_shape_and_offsets(text, said):
    assert refusal(with_entry(text)).message == f"the entry of 'a' {said}"


def test_offsets_must_not_end_before_they_begin():
    message = refusal(with_entry('{"dtype":"U8","shape":[2],"data_offsets":[2,0]}')).message
    assert message == "the data_offsets of 'a' end before they begin: [2, 0]"


@pytest.mark.parametrize("dtype", ['"F128"', '"u8"', '""', "1", "null", "[]", '{"U8":null}'])
def test_an_unknown_dtype_is_answered_with_those_known(dtype):
    error = refusal(with_entry(f'{{"dtype":{dtype},"shape":[2],"data_offsets":[0,2]}}'))
    assert "'a' has the unknown dtype" in error.message
    assert "BF16" in error.hint


NO_SIZES = ["1", "null", '"2"', "[2.0]", "[1e0]", "[-1]", "[-0]", "[true]", "[null]", '["2"]', "[[2]]", "[NaN]", "{}"]


@pytest.mark.parametrize("shape", [*NO_SIZES, f"[{2**63}]", f"[{10**30}]", f"[{10**400}]"])
def test_a_shape_must_be_a_list_of_sizes(shape):
    message = refusal(with_entry(f'{{"dtype":"U8","shape":{shape},"data_offsets":[0,2]}}')).message
    assert "shape of 'a'" in message or "not valid JSON" in message


@pytest.mark.parametrize(
    "offsets", [*NO_SIZES, "[]", "[0]", "[0,1,2]", "[2,0]", "[0.0,2]", "[0,2.0]", "[-2,0]", f"[0,{2**64}]"]
)
def test_offsets_must_be_a_begin_and_an_end(offsets):
    message = refusal(with_entry(f'{{"dtype":"U8","shape":[2],"data_offsets":{offsets}}}')).message
    assert "data_offsets of 'a'" in message or "not valid JSON" in message


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [("U8", [3], 2), ("F32", [2], 2), ("F32", [], 3), ("U8", [0], 2), ("BF16", [2**40, 2**40], 2), ("F4", [2], 2)],
)
def test_offsets_must_span_what_shape_and_dtype_take(dtype, shape, nbytes):
    error = refusal(encode({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}, b"x" * nbytes))
    assert f"'a' is {dtype} {shape}, which takes" in error.message
    assert f"but its data_offsets span {nbytes}" in error.message


@pytest.mark.parametrize(("dtype", "shape"), [("F4", [3]), ("F4", []), ("F6_E2M3", [2]), ("F6_E3M2", [5, 5])])
def test_types_smaller_than_a_byte_must_fill_whole_bytes(dtype, shape):
    error = refusal(encode({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 1]}}, b"x"))
    assert "not a whole number of bytes" in error.message


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [1, 2**63 - 1, 2, 0]])
def test_a_shape_whose_strides_no_tensor_can_have_is_too_large(shape):
    error = refusal(encode({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}}))
    assert "too large" in error.message


def two(first: list[int], second: list[int], data: bytes) -> bytes:
    entries: dict[str, Any] = {}
    for name, (begin, end) in {"a": first, "b": second}.items():
        entries[name] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
    return encode(entries, data)


@pytest.mark.parametrize("second", [[1, 3], [0, 2], [0, 4], [1, 1]])
def test_tensors_that_overlap_are_named(second):
    error = refusal(two([0, 2], second, b"abcd"))
    assert re.search("'[ab]' overlaps '[ab]'", error.message)
    assert error.offset is not None


def test_a_hole_between_tensors_is_located():
    content = two([0, 2], [3, 4], b"abcd")
    error = refusal(content)
    assert "'b' leaves a hole after 'a'" in error.message
    assert error.offset == len(content) - 1


def test_a_hole_before_the_first_tensor_is_located():
    assert "'a' leaves a hole after the header" in refusal(two([1, 2], [2, 4], b"abcd")).message


def test_data_that_is_cut_short_says_by_how_much():
    content = checkpoint({"a": entry("F32", [100])})
    error = refusal(content[:-1])
    assert f"cut short: the header describes {len(content)} bytes, the file has {len(content) - 1}" in error.message
    assert "copy or download it again" in error.hint


def test_bytes_after_the_last_tensor_are_refused():
    content = checkpoint({"a": entry("F32", [1])})
    error = refusal(content + b"xyz")
    assert "3 bytes after the last tensor belong to none" in error.message
    assert error.offset == len(content)


def test_a_message_stays_short_whatever_the_header_holds():
    name, dtype = "n" * 1_000_000, "d" * 1_000_000
    refusal(encode({name: {"dtype": dtype, "shape": [1], "data_offsets": [0, 1]}}, b"x"))
    refusal(encode({name: {"dtype": "U8", "shape": [1] * 100_000, "data_offsets": [0, 9]}}, b"x"))


@pytest.mark.parametrize("blank", ["", " ", "\n"])
@pytest.mark.parametrize("text", ["y", ":y", '\\":y', '\\"', "y\\\\", '{\\"y\\": [\\"\\"]}'])
def test_a_name_that_comes_twice_is_found_whatever_stands_around_it(blank: str, text: str):
    one = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
    content = encode(f'{{"__metadata__":{{"x":"{text}"}},"a":{one},"a"{blank}:{one}}}', b"ab")
    assert "'a' twice" in str(refusal(content))
    once = encode(f'{{"__metadata__":{{"x":"{text}"}},"a"{blank}:{one}}}', b"ab")
    assert [info.name for info in parse(once).tensors] == ["a"]


def test_a_name_that_ends_in_a_backslash_hides_no_other():
    one = '"dtype":"U8","shape":[2],"data_offsets":[0,2]'
    none = '"dtype":"U8","shape":[0],"data_offsets":[2,2]'
    twice = encode(f'{{"a":{{"dtype":"U8",{one}}},"b\\\\":{{{none}}}}}', b"ab")
    assert "'dtype' twice" in str(refusal(twice))
    once = encode(f'{{"a":{{{one}}},"b\\\\":{{{none}}}}}', b"ab")
    assert {info.name for info in parse(once).tensors} == {"a", "b\\"}
