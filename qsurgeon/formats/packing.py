"""Codes to bytes and back.

4-bit codes lie two to a byte along the last dimension, the earlier in the low nibble: the order of
compressed-tensors, ModelOpt and gpt-oss checkpoints. 8-bit codes are bytes already.
"""

import torch
from torch import Tensor

from qsurgeon.errors import ShapeError

_PER_BYTE = {4: 2, 8: 1}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return ``codes`` (..., k) of ``bits`` bits as bytes (..., ceil(k · bits / 8)), uint8.

    A last byte that is not full is filled with code 0. Raises: ShapeError for a width that has no layout here.
    """
    if _codes_per_byte(bits) == 1:
        return codes.contiguous()
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(data: Tensor, bits: int, length: int) -> Tensor:
    """Return the first ``length`` codes (..., length), uint8, of the bytes ``data``.

    Raises: ShapeError for a width that has no layout here, and for bytes that do not hold ``length`` codes.
    """
    per_byte = _codes_per_byte(bits)
    if data.shape[-1] != -(-length // per_byte):
        raise ShapeError(
            f"{data.shape[-1]} bytes a row cannot be {length} codes of {bits} bits; expected {-(-length // per_byte)}"
        )
    if per_byte == 1:
        return data
    return torch.stack([data & 0xF, data >> 4], dim=-1).flatten(-2)[..., :length]


def _codes_per_byte(bits: int) -> int:
    if bits not in _PER_BYTE:
        raise ShapeError(f"no byte layout for codes of {bits} bits; known: {', '.join(map(str, _PER_BYTE))}")
    return _PER_BYTE[bits]
