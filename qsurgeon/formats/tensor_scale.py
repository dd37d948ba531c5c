"""The shapes in which the FP32 scale above the blocks travels; what shares one, a format says (``has_row_scales``).

- kept: () for the whole tensor, or the shape of the tensor without its columns: in ``Quantized`` and ``Scales``.
- above: (1, …, 1) or (…, rows, 1), which broadcasts over rows: as it is found, and as backends are given it.
- per row: (1,) or (rows of all matrices,), contiguous: what compiled code counts along.
- bytes: (1, 4) or (rows, 4), uint8: what a checkpoint stores of a matrix.
"""

import torch
from torch import Tensor

from qsurgeon.formats.fields import Fields


def kept(above: Tensor, lead: torch.Size, fields: Fields) -> Tensor:
    """Return ``above`` as it is kept; ``lead``: the shape of the tensor without its columns."""
    return above.reshape(lead if fields.has_row_scales else ())


def kept_by_row(above: Tensor, lead: torch.Size) -> Tensor:
    """Return ``above`` as it is kept of tensors that are stacked, each with a scale of its own: one a row."""
    return above.expand(*lead, 1).squeeze(-1)


def above_of(kept: Tensor, lead: torch.Size) -> Tensor:
    """Return what is kept in the shape that broadcasts over rows, at least two-dimensional."""
    above = kept.reshape(*lead, 1) if kept.dim() else kept.reshape([1] * (len(lead) + 1))
    return above if above.dim() > 1 else above[None]


def per_row(above: Tensor | None, rows: Tensor) -> Tensor | None:
    """Return the tensor scale of ``rows`` (…, rows, columns) as one number, (1,), or one a row of all matrices."""
    if above is None or above.numel() == 1:
        return None if above is None else above.reshape(1)
    return above.expand(*rows.shape[:-1], 1).reshape(-1).contiguous()


def of_rows(per_row: Tensor | None, shape: torch.Size, matrix: int, part: slice) -> Tensor | None:
    """Return, of (matrices, rows, columns), the tensor scale of some rows of a matrix: above, (rows, 1) or (1, 1)."""
    if per_row is None or per_row.numel() == 1:
        return None if per_row is None else per_row[:, None]
    return per_row.view(shape[:2])[matrix, part, None]


def of_blocks(per_row: Tensor | None, blocks: int) -> Tensor | None:
    """Return the tensor scale of each block, ``blocks`` in each row: above, (rows · blocks, 1) or (1, 1)."""
    if per_row is None or len(per_row) == 1:
        return None if per_row is None else per_row[:, None]
    return per_row[:, None].repeat_interleave(blocks, 0)


def bytes_of(kept: Tensor) -> Tensor:
    """Return the bytes of what is kept of a matrix; they share its memory."""
    return kept.reshape(-1, 1).view(torch.uint8)


def bytes_shape(rows: int, fields: Fields) -> tuple[int, int]:
    """Return the shape of the bytes of a matrix' tensor scale."""
    return rows if fields.has_row_scales else 1, torch.float32.itemsize


def of_bytes(numbers: Tensor, fields: Fields) -> Tensor:
    """Return as it is kept the tensor scale of a matrix whose bytes, seen as float32, are ``numbers``."""
    return numbers.reshape(-1) if fields.has_row_scales else numbers.reshape(())
