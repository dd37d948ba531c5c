"""transformers' Conv1D (GPT-2, ImageGPT, Decision Transformer): a Linear whose weight is (inputs, outputs)."""

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qsurgeon.layers.added import Added
from qsurgeon.layers.codes import Codes
from qsurgeon.layers.export import refuse_export
from qsurgeon.layers.kinds.kind import Kind
from qsurgeon.layers.layer import QuantProduct, Weight
from qsurgeon.layers.packed import PackedLayer
from qsurgeon.layers.phases import is_active
from qsurgeon.layers.product import quantized_linear
from qsurgeon.layers.sharded import is_sharded, on_mesh, refuse_added, refuse_part, sharded_linear
from qsurgeon.storage.packed import WEIGHT


class QuantConv1D(QuantProduct, Conv1D):
    """``Conv1D`` whose weight and input are rounded in each forward pass; the bias and the output are not.

    Shapes: (..., nx) in, (..., nf) out; the weight is (nx, nf). It computes what a QuantLinear does with the transposed
    weight, to the bit: blocks, rotations and scales of rows run along nx.
    """

    source = Conv1D
    weights = (Weight(contraction=-2),)

    @property
    def features(self) -> tuple[int, int]:
        """How many outputs and inputs the layer has."""
        return self.nf, self.nx

    def forward(self, x: Tensor, added: Added | None = None) -> Tensor:
        """Return q(x) · q(Wᵀ)ᵀ + b, or x · W + b in a phase in which the layer does not round.

        added: as a QuantLinear's.
        """
        how, weight = self.quantization, self.weight
        if not is_active(self, how.behavior.phases):
            if added is not None:
                return nn.functional.linear(x, added.to(weight).mT, self.bias)
            plain: Tensor = super().forward(on_mesh(x, weight))  # type: ignore[no-untyped-call]
            return plain
        refuse_export(self.training)
        rows = weight.mT
        if is_sharded(weight):
            refuse_added(self._described(), added)
            return sharded_linear(x, rows, self.bias, self._described())
        if rows.shape != self.features:
            refuse_part(self._described(), rows)
        turned = None if added is None else added.transposed
        return quantized_linear(x, rows, self.bias, how, name=self.name, added=turned)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of the layer."""
        return f"nf={self.nf}, nx={self.nx}, {super().extra_repr()}"

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)


class PackedConv1D(PackedLayer, QuantConv1D):
    """A QuantConv1D whose weight is packed as (outputs, inputs), as a PackedLinear with the transposed weight is."""

    def forward(self, x: Tensor, added: Added | None = None) -> Tensor:
        """Return q(x) · q(Wᵀ)ᵀ + b. Raises: as a PackedLinear's."""
        return super().forward(x, added)

    def _as_codes(self, name: str, value: Any) -> Any:
        codes = super()._as_codes(name, value)
        if name == WEIGHT and isinstance(codes, Codes):
            # peft (0.21) takes the features of a Conv1D from the shape of its weight, or from this where it has it:
            # DeepSpeed leaves the shape of what it partitions here.
            vars(codes)["ds_shape"] = self.nx, self.nf
        return codes


CONV1D = Kind("Conv1D", QuantConv1D, PackedConv1D)
