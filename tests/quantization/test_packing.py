import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqakd_hf import InputError
from sqakd_hf.quantization.packing import checksum, pack_bits, packed_row_bytes, unpack_bits


BITS = range(1, 9)


def reference_pack(rows, bits):
    """The layout as documented, on Python integers: one big number per row, lowest bits first."""
    packed = []
    for row in rows:
        number = sum(code << (i * bits) for i, code in enumerate(row))
        packed.append(list(number.to_bytes((len(row) * bits + 7) // 8, "little")))
    return packed


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 16, 27, 147])
def test_bytes_are_the_documented_stream_and_unpack_to_the_same_codes(bits, length):
    generator = torch.Generator().manual_seed(100 * bits + length)
    codes = torch.randint(0, 2**bits, (5, length), generator=generator, dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.tolist() == reference_pack(codes.tolist(), bits)
    assert packed.shape[1] == packed_row_bytes(length, bits) == -(-length * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, length), codes)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), bits=st.integers(1, 8), rows=st.integers(0, 4), length=st.integers(1, 40))
def test_any_codes_survive(data, bits, rows, length):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * length, max_size=rows * length))
    codes = torch.tensor(values, dtype=torch.uint8).view(rows, length)
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, length), codes)


@pytest.mark.parametrize("bits", BITS)
def test_codes_in_any_memory_order_pack_alike(bits):
    codes = torch.randint(0, 2**bits, (6, 10), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    assert torch.equal(pack_bits(codes.t().contiguous().t(), bits), pack_bits(codes, bits))
    assert torch.equal(
        pack_bits(torch.cat([codes, codes])[::2], bits), pack_bits(torch.cat([codes, codes])[::2] + 0, bits)
    )


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_that_does_not_fit_is_refused(bits):
    with pytest.raises(InputError, match=f"{2**bits} does not fit into {bits} bits"):
        pack_bits(torch.tensor([[2**bits]], dtype=torch.uint8), bits)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, True, None])
def test_bits_outside_1_to_8_are_refused(bits):
    codes = torch.zeros(1, 8, dtype=torch.uint8)
    for call in (lambda: pack_bits(codes, bits), lambda: unpack_bits(codes, bits, 8)):
        with pytest.raises(InputError, match="from 1 to 8"):
            call()


def test_wrong_tensors_are_refused():
    with pytest.raises(InputError, match="uint8 tensor of two dimensions"):
        pack_bits(torch.zeros(2, 2), 2)
    with pytest.raises(InputError, match="uint8 tensor of two dimensions"):
        unpack_bits(torch.zeros(2, dtype=torch.uint8), 2, 8)
    with pytest.raises(InputError, match="rows of 2 bytes, got 3"):
        unpack_bits(torch.zeros(2, 3, dtype=torch.uint8), 2, 8)


def test_checksum_is_crc32_of_dtype_shape_and_bytes_and_sees_every_flipped_bit():
    # What the standard's check value (CRC-32 of "123456789" is cbf43926) is made of, after the kind of tensor.
    assert zlib.crc32(b"123456789") == 0xCBF43926
    data = torch.tensor(list(b"123456789"), dtype=torch.uint8)
    assert int(checksum(data), 16) == zlib.crc32(b"uint8[9]123456789")
    values = torch.tensor([1.5, -2.0, 0.0])
    seen = {checksum(values)}
    for bit in range(96):
        flipped = values.clone()
        flipped.view(torch.uint8)[bit // 8] ^= 1 << (bit % 8)
        seen.add(checksum(flipped))
    assert len(seen) == 97


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool])
def test_checksum_takes_any_dtype_shape_and_memory_order(dtype):
    x = torch.arange(12).reshape(3, 4).to(dtype)
    assert checksum(x.t()) == checksum(x.t().contiguous())
    assert len(checksum(x[0, 0])) == len(checksum(x[:0])) == 8


def test_checksum_tells_dtypes_and_shapes_apart():
    zeros = torch.zeros(2, 3)
    kinds = [zeros, zeros.t(), zeros.reshape(6), zeros.int(), zeros.view(torch.uint8)]
    assert len({checksum(kind) for kind in kinds}) == len(kinds)
