"""Every element type of safetensors arrives bit for bit."""

import pytest
import torch
from safetensors import SafetensorError, safe_open

from engine_loader import CheckpointError, open_checkpoint
from engine_loader.formats.dtypes import DTYPE_BITS, torch_dtype
from tests.support.checkpoints import Entry, checkpoint, encode, entry, tensor_bytes

EIGHT_BITS = [dtype for dtype, bits in DTYPE_BITS.items() if bits == 8]
SIX_BITS = ["F6_E2M3", "F6_E3M2"]


def read_alike(path, dtype: str, shape: list[int], content: bytes) -> torch.Tensor:
    """The tensor "t", compared with safetensors' own reading where it has one, and by every way that we have."""
    with open_checkpoint(path) as opened:
        (streamed,) = (tensor for name, tensor in opened.tensors(["t"]))
        got, part = opened.get_tensor("t"), opened.get_slice("t")[...]
        into = torch.empty_like(got)
        opened.load_into({"t": into})
    for tensor in (streamed, got, part, into):
        assert (tensor.dtype, tensor.shape) == (got.dtype, got.shape)
        assert tensor_bytes(tensor) == content
        assert tensor.is_contiguous()
    try:
        with safe_open(path, "pt") as file:
            theirs = file.get_tensor("t")
    except SafetensorError:
        assert dtype in SIX_BITS
    else:
        assert (got.dtype, got.shape) == (theirs.dtype, theirs.shape)
        assert tensor_bytes(theirs) == content
    return got


def put(path, tensor: Entry, *, before: Entry | None = None) -> None:
    path.write_bytes(checkpoint({**({"before": before} if before else {}), "t": tensor}))


@pytest.mark.parametrize("dtype", list(DTYPE_BITS))
@pytest.mark.parametrize("shape", [[3, 8], [8], [2, 0, 8], [0], [1, 1, 1, 8, 1, 8]])
def test_every_type(tmp_path, dtype, shape):
    tensor = entry(dtype, shape, seed=7)
    put(tmp_path / "w", tensor)
    read_alike(tmp_path / "w", dtype, shape, tensor[2])


@pytest.mark.parametrize("dtype", [dtype for dtype, bits in DTYPE_BITS.items() if bits >= 8])
def test_every_type_as_a_scalar_at_an_odd_offset(tmp_path, dtype):
    tensor = entry(dtype, [], seed=8)
    put(tmp_path / "w", tensor, before=entry("U8", [3]))
    assert read_alike(tmp_path / "w", dtype, [], tensor[2]).shape == ()


@pytest.mark.parametrize("dtype", list(DTYPE_BITS))
def test_every_type_at_an_odd_offset_and_too_large_to_be_copied(tmp_path, dtype):
    tensor = entry(dtype, [5000, 8], seed=9)
    put(tmp_path / "w", tensor, before=entry("U8", [3]))
    read_alike(tmp_path / "w", dtype, [5000, 8], tensor[2])


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_all_bit_patterns_of_the_eight_bit_types(tmp_path, dtype):
    everything = bytes(range(256)) * 100
    put(tmp_path / "w", (dtype, [len(everything)], everything))
    read_alike(tmp_path / "w", dtype, [len(everything)], everything)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_all_bit_patterns_of_the_sixteen_bit_types(tmp_path, dtype):
    everything = b"".join(number.to_bytes(2, "little") for number in range(1 << 16))
    put(tmp_path / "w", (dtype, [256, 256], everything))
    read_alike(tmp_path / "w", dtype, [256, 256], everything)


@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [("F32", "0100807f"), ("F32", "ffffffff"), ("F64", "010000000000f07f"), ("C64", "0100807f010080ff")],
)
def test_nan_payloads_survive(tmp_path, dtype, pattern):
    content = bytes.fromhex(pattern) * 3
    put(tmp_path / "w", (dtype, [3], content))
    assert read_alike(tmp_path / "w", dtype, [3], content).isnan().all()


@pytest.mark.parametrize("dtype", SIX_BITS)
def test_six_bit_numbers_come_as_their_packed_bytes(tmp_path, dtype):
    tensor = entry(dtype, [3, 8])
    put(tmp_path / "w", tensor)
    got = read_alike(tmp_path / "w", dtype, [3, 8], tensor[2])
    assert (got.dtype, tuple(got.shape)) == (torch.uint8, (3, 6))


def test_four_bit_numbers_come_in_pairs(tmp_path):
    tensor = entry("F4", [3, 8])
    put(tmp_path / "w", tensor)
    got = read_alike(tmp_path / "w", "F4", [3, 8], tensor[2])
    assert (got.dtype, tuple(got.shape)) == (torch.float4_e2m1fn_x2, (3, 4))


def test_rows_that_are_no_whole_bytes_are_refused_by_name_when_they_are_read(tmp_path):
    header = {"t": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}}
    (tmp_path / "w").write_bytes(encode(header, b"abc"))
    with open_checkpoint(tmp_path / "w") as opened:
        assert opened.info("t").shape == (2, 3)
        for read in (opened.get_tensor, opened.get_slice, lambda name: next(opened.tensors([name]))):
            with pytest.raises(CheckpointError, match=r"w: 't': F4 \[2, 3\] cannot be a torch tensor"):
                read("t")


def test_a_type_that_this_torch_does_not_have_is_refused_by_name(tmp_path, monkeypatch):
    put(tmp_path / "w", entry("F8_E8M0", [4]))
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    torch_dtype.cache_clear()
    try:
        with (
            open_checkpoint(tmp_path / "w") as opened,
            pytest.raises(CheckpointError, match=r"w: 't': .*F8_E8M0") as caught,
        ):
            opened.get_tensor("t")
    finally:
        torch_dtype.cache_clear()
    assert "torch.float8_e8m0fnu" in caught.value.hint
