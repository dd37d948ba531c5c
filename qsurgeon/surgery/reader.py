"""What code that reads a weight itself gets, if the weight is rounded in its layer or packed."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from qsurgeon.formats import get_format
from qsurgeon.layers import PackedLinear, Quantization
from qsurgeon.surgery.source import HANDED

# What describes a weight; all else that is asked of one are its values.
_DESCRIBES = {
    "device", "dim", "dtype", "element_size", "get_device", "grad", "is_contiguous", "is_cuda", "is_floating_point",
    "is_meta", "itemsize", "layout", "ndim", "ndimension", "nelement", "numel", "requires_grad", "shape", "size",
    "stride",
}  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """Code that takes a weight.

    where: the function. what: the attribute that it asks of the weight; nothing if it takes the values. certain:
    whether it does so whenever it is called.
    """

    where: str
    what: str
    certain: bool

    @property
    def takes_values(self) -> bool:
        """Whether it takes the weight's values, which nothing has rounded."""
        return self.what not in _DESCRIBES

    @property
    def remark(self) -> str:
        """Say that it may compute with the weight past its Linear."""
        if self.what == HANDED:
            return f"{self.where} is handed its weight, and a kernel in the place of that computes with it, unrounded"
        return f"{self.where} takes its weight itself in some calls, unrounded"

    @property
    def misreads_codes(self) -> bool:
        """Whether it gets another answer from a weight that is packed. A kernel that is handed codes fails on them."""
        return self.what != HANDED and (self.takes_values or not _is_the_same_packed(self.what))


@cache
def _is_the_same_packed(what: str) -> bool:
    """Return whether a weight that is packed describes itself as it did before, asked for ``what``."""
    plain, packed = nn.Linear(64, 64, device="meta"), nn.Linear(64, 64, device="meta")
    plain.weight.requires_grad_(False)
    PackedLinear.wrap(packed, Quantization(get_format("mxfp4"), None))
    answers = [getattr(one.weight, what, None) for one in (plain, packed)]
    before, after = (one() if callable(one) and not isinstance(one, torch.dtype) else one for one in answers)
    return bool(before == after)
