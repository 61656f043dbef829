"""Integer codes as a dense stream of bits, and checksums of what is stored.

Each row of codes becomes a run of whole bytes: code `i` of a row fills the bits `i * bits ... (i + 1) * bits - 1`,
counted from the lowest bit of the row's first byte; the last byte is filled up with zeros.
"""

import math
import zlib

import torch

from .._validation import check_bits
from ..errors import InputError


def packed_row_bytes(length: int, bits: int) -> int:
    """Return the bytes that a row of `length` codes takes.

    Examples:
        >>> packed_row_bytes(9, bits=3)
        4
    """
    return (length * check_bits(bits) + 7) // 8


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integer codes into bytes.

    Args:
        codes (`torch.Tensor`): `uint8` codes `(rows, length)`, each below `2 ** bits`.
        bits (`int`): 1 to 8.

    Returns:
        `torch.Tensor`: `uint8`, `(rows, ceil(length * bits / 8))`.

    Raises:
        `InputError`: Another dtype or number of dimensions, or a code that does not fit.

    Examples:
        >>> pack_bits(torch.tensor([[1, 2, 3]], dtype=torch.uint8), bits=2)
        tensor([[57]], dtype=torch.uint8)
    """
    largest = 2 ** check_bits(bits) - 1
    _require_rows(codes, "codes")
    if codes.numel() and int(codes.max()) > largest:
        raise InputError(f"The code {int(codes.max())} does not fit into {bits} bits; accepted: 0 to {largest}.")
    rows, length = codes.shape
    per_group, bytes_per_group = _group(bits)
    groups = math.ceil(length / per_group)
    codes = torch.nn.functional.pad(codes, (0, groups * per_group - length)).view(rows, groups, per_group)
    packed = codes.new_zeros(rows, groups, bytes_per_group)
    for index in range(per_group):
        byte, shift = divmod(index * bits, 8)
        packed[..., byte] |= codes[..., index] << shift
        if shift + bits > 8:  # the code continues in the next byte
            packed[..., byte + 1] |= codes[..., index] >> (8 - shift)
    return packed.flatten(1)[:, : packed_row_bytes(length, bits)].contiguous()


def unpack_bits(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """Unpack what [`pack_bits`] packed.

    Args:
        packed (`torch.Tensor`): `uint8`, `(rows, ceil(length * bits / 8))`.
        bits (`int`): 1 to 8.
        length (`int`): Number of codes in a row.

    Returns:
        `torch.Tensor`: `uint8` codes `(rows, length)`.

    Raises:
        `InputError`: Another dtype or shape.

    Examples:
        >>> unpack_bits(torch.tensor([[57]], dtype=torch.uint8), bits=2, length=3)
        tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    expected = packed_row_bytes(length, bits)
    _require_rows(packed, "packed")
    if packed.shape[1] != expected:
        raise InputError(f"{length} codes of {bits} bits take rows of {expected} bytes, got {packed.shape[1]}.")
    rows = packed.shape[0]
    per_group, bytes_per_group = _group(bits)
    groups = math.ceil(length / per_group)
    packed = torch.nn.functional.pad(packed, (0, groups * bytes_per_group - expected))
    packed = packed.view(rows, groups, bytes_per_group)
    codes = packed.new_empty(rows, groups, per_group)
    for index in range(per_group):
        byte, shift = divmod(index * bits, 8)
        code = packed[..., byte] >> shift
        if shift + bits > 8:
            code |= packed[..., byte + 1] << (8 - shift)
        codes[..., index] = code & (2**bits - 1)
    return codes.flatten(1)[:, :length].contiguous()


def checksum(tensor: torch.Tensor) -> str:
    """Return the CRC-32 of a tensor's dtype, shape and bytes, as eight hexadecimal digits.

    It finds damage; it is no proof of origin.

    Examples:
        >>> checksum(torch.tensor([1, 2, 3], dtype=torch.uint8))
        'fd65fa9c'
    """
    kind = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{zlib.crc32(flat.numpy(), zlib.crc32(kind.encode())):08x}"


def _group(bits: int) -> tuple[int, int]:
    """Return the smallest number of codes that fill whole bytes, and how many bytes that is."""
    common = math.gcd(8, bits)
    return 8 // common, bits // common


def _require_rows(tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype != torch.uint8 or tensor.dim() != 2:
        raise InputError(f"{name} must be a uint8 tensor of two dimensions, got {tensor.dtype} {list(tensor.shape)}.")
