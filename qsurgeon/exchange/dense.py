"""Values in full precision, which any program reads: each weight as its format has rounded it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from qsurgeon.checkpoint.reading.headers import FLOATS
from qsurgeon.checkpoint.writing.layout import Encoded
from qsurgeon.errors import ExchangeError
from qsurgeon.exchange.encodings import Values
from qsurgeon.exchange.source import Wrapped
from qsurgeon.exchange.target import Exported, Scheme, Target
from qsurgeon.formats import Format
from qsurgeon.formats.element import FloatElement
from qsurgeon.formats.scale import PowerOfTwoScale


class Dense(Target):
    """The target of this module. Inputs stay as they are: whoever loads it computes with rounded weights alone."""

    name = "dense"
    pairs: ClassVar[Mapping[str, Sequence[str]]] = {}

    def scheme(self, one: Wrapped, *, weight_only: bool) -> Scheme:
        """Return what a wrapped weight becomes: values in its own dtype, or in float32 where that cannot hold them.

        Raises: ExchangeError for a weight with more than two dimensions.
        """
        how = one.how.weight
        assert how is not None
        if len(one.module.shape) != 2:
            raise ExchangeError(f"{one.module.name}: its weight is no matrix, but {list(one.module.shape)}")
        own = one.stored.dtype if isinstance(one.stored, Encoded) else FLOATS[one.tensors[0].dtype]
        dtype = own if holds(own, how) else torch.float32
        return Scheme(how.name, "", Values(dtype, one.module.declared.is_transposed), {})

    def files(self, config: dict[str, Any], exported: Sequence[Exported], plain: Sequence[str]) -> dict[str, Any]:
        """Return config.json without a ``quantization_config``."""
        return {"config.json": {key: value for key, value in config.items() if key != "quantization_config"}}


def holds(dtype: torch.dtype, format: Format) -> bool:
    """Return whether ``dtype`` has every value that a block of ``format`` can, to the bit.

    Those under a tensor scale have as many digits as float32, and so have those that are rotated back.
    """
    info = torch.finfo(dtype)
    if info.bits >= torch.finfo(torch.float32).bits:
        return True
    scale, element = format.scale, format.element
    if not isinstance(scale, PowerOfTwoScale) or format.hadamard is not None:
        return False
    digits = element.mantissa if isinstance(element, FloatElement) else element.bits - 2
    smallest = element.smallest * scale.smallest
    return (
        digits <= -round(math.log2(info.eps))
        and smallest >= info.smallest_normal * info.eps
        and element.max * format.largest_scale <= info.max
    )
