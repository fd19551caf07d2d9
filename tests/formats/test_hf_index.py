"""model.safetensors.index.json: it comes from outside, and is believed only as far as it makes sense."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.errors import CheckpointError
from engine_loader.formats.hf_index import INDEX_NAME, ShardIndex, parse_index
from tests.support.checkpoints import index

FILE = f"/models/llama/{INDEX_NAME}"


def refusal(text: bytes) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        parse_index(text, FILE)
    assert str(caught.value).startswith(FILE)
    return caught.value


def test_an_index_says_which_shard_holds_which_tensor():
    found = parse_index(index({"b": "two.safetensors", "a": "one.safetensors", "c": "two.safetensors"}), FILE)
    assert found == ShardIndex(FILE, {"b": "two.safetensors", "a": "one.safetensors", "c": "two.safetensors"})
    assert found.shards == ["two.safetensors", "one.safetensors"]


def test_shards_lie_beside_the_index():
    found = parse_index(index({"a": "one.safetensors", "b": "more/two.safetensors"}), FILE)
    assert [found.path_of(shard) for shard in found.shards] == [
        "/models/llama/one.safetensors",
        "/models/llama/more/two.safetensors",
    ]


@pytest.mark.parametrize(
    "shard",
    [
        "",
        "../other.safetensors",
        "shards/../../other.safetensors",
        "..",
        "/etc/passwd",
        "a\0.safetensors",
        "..\\other.safetensors",
        "C:\\weights.safetensors",
        "line\nbreak.safetensors",
        "\x1b[2J.safetensors",
        "\ud800.safetensors",
    ],
)
def test_a_shard_outside_the_directory_is_refused(shard):
    assert repr(shard) in refusal(json.dumps({"weight_map": {"a": "ok.safetensors", "b": shard}}).encode()).message


@pytest.mark.parametrize("shard", ["模型.safetensors", "a b.safetensors", "..a..safetensors", "-rf", "~", "$HOME"])
def test_an_unusual_file_name_is_a_file_name(shard):
    assert parse_index(index({"a": shard}), FILE).shards == [shard]


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"\xef\xbb\xbf{}", b"{}{}", b"[" * 100_000, b'{"a":' * 100_000])
def test_an_index_that_is_not_json_is_to_be_fetched_again(text):
    error = refusal(text)
    assert "not valid JSON" in error.message
    assert error.hint == "download it again"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "is not a JSON object"),
        ("null", "is not a JSON object"),
        ("{}", "has no weight_map of tensor names to file names"),
        ('{"weight_map":null}', "'s weight_map is not an object of tensor names to file names"),
        ('{"weight_map":[]}', "'s weight_map is not an object of tensor names to file names"),
        ('{"weight_map":"a"}', "'s weight_map is not an object of tensor names to file names"),
        ('{"weight_map":{"b":"c","a":1}}', "gives 'a' a file name that is not a string: 1"),
        ('{"weight_map":{"a":null}}', "gives 'a' a file name that is not a string: None"),
        ('{"weight_map":{"a":["b"]}}', "gives 'a' a file name that is not a string: ['b']"),
    ],
)
def test_an_index_without_a_map_of_names_is_refused(text, said):
    message = refusal(text.encode()).message
    assert message.startswith("the index") and message.removeprefix("the index").strip() == said


def test_an_index_that_names_nothing_is_refused():
    assert "names no tensors" in refusal(b'{"weight_map":{}}').message


def test_a_tensor_that_is_put_into_two_shards_is_named():
    assert "the index has 'a' twice" in refusal(b'{"weight_map":{"a":"x","a":"y"}}').message


def test_a_tensor_that_is_put_into_the_same_shard_twice_is_no_error():
    assert parse_index(b'{"weight_map":{"a":"x","a":"x"}}', FILE).weight_map == {"a": "x"}


@given(st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_no_input_makes_anything_but_a_checkpoint_error(text):
    try:
        assert parse_index(text, FILE).weight_map
    except CheckpointError as error:
        assert error.file == FILE
