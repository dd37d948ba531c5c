"""``nn.Linear``: one weight, (outputs, inputs)."""

from qsurgeon.layers.kinds.kind import Kind
from qsurgeon.layers.linear import QuantLinear
from qsurgeon.layers.packed import PackedLinear

LINEAR = Kind("Linear", QuantLinear, PackedLinear)
