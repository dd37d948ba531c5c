"""QuantLinear: a Linear that multiplies rounded inputs with a rounded weight."""

from torch import Tensor, nn
from torch.nn import Parameter

from qsurgeon.layers.added import Added
from qsurgeon.layers.export import refuse_export
from qsurgeon.layers.layer import QuantProduct
from qsurgeon.layers.phases import is_active
from qsurgeon.layers.product import quantized_linear
from qsurgeon.layers.sharded import is_sharded, on_mesh, refuse_added, refuse_part, sharded_linear


class QuantLinear(QuantProduct, nn.Linear):
    """``nn.Linear`` whose weight and input are rounded in each forward pass; the bias and the output are not.

    Shapes: (..., in_features) in, (..., out_features) out. Parameters and their names are ``nn.Linear``'s, and
    there are no buffers: state dicts, optimizers, peft and FSDP see the layer they know. The weight itself is
    never changed: y = q(x) · q(W)ᵀ + b, and with the straight-through gradient grad_x = g · q(W) and
    grad_W = gᵀ · q(x). Where the formats rotate, R, both are rotated before they are rounded, which leaves the
    product alone: y = q(xR) · q(WR)ᵀ + b, and the gradients are rotated back.

    It acts where it is called. A parent that reads ``.weight`` itself (WavLM's attention, Mamba's fused kernels, the
    fast path of nn.TransformerEncoderLayer) computes past it.
    """

    source = nn.Linear

    @property
    def features(self) -> tuple[int, int]:
        """How many outputs and inputs the layer has."""
        return self.out_features, self.in_features

    def forward(self, input: Tensor, added: Added | None = None) -> Tensor:
        """Return q(x) · q(W)ᵀ + b, or x · Wᵀ + b in a phase in which the layer does not round.

        added: what is added to W in this call, see ``adapters: merged``. Raises: SurgeryError for a weight that is
        split then.
        """
        how, weight = self.quantization, self.weight
        # Of another type: a DTensor, or what a hook or a parametrization computed.
        is_split = type(weight) is not Parameter and is_sharded(weight)
        if not is_active(self, how.behavior.phases):
            whole = weight if added is None else added.to(weight)
            return nn.functional.linear(on_mesh(input, weight) if is_split else input, whole, self.bias)
        refuse_export(self.training)
        if is_split:
            refuse_added(self._described(), added)
            return sharded_linear(input, weight, self.bias, self._described())
        rows, columns = weight.shape
        if rows < self.out_features or columns < self.in_features:
            refuse_part(self._described(), weight)
        return quantized_linear(input, weight, self.bias, how, name=self.name, added=added)
