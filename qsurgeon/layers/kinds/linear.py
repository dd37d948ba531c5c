"""``nn.Linear``: one weight, (outputs, inputs)."""

from qsurgeon.layers.kinds.kind import Kind, register
from qsurgeon.layers.linear import QuantLinear
from qsurgeon.layers.packed import PackedLinear

LINEAR = register(Kind("Linear", QuantLinear, PackedLinear))
