"""QuantLinear: a Linear that multiplies rounded inputs with a rounded weight."""

from torch import Tensor, nn

from qsurgeon.errors import SurgeryError
from qsurgeon.layers.export import refuse_export, refuse_script
from qsurgeon.layers.phases import is_active
from qsurgeon.layers.product import quantized_linear
from qsurgeon.layers.quantization import Quantization


class QuantLinear(nn.Linear):
    """``nn.Linear`` whose weight and input are rounded in each forward pass; the bias and the output are not.

    Shapes: (..., in_features) in, (..., out_features) out. Parameters and their names are ``nn.Linear``'s, and
    there are no buffers: state dicts, optimizers, peft and FSDP see the layer they know. The weight itself is
    never changed: y = q(x) · q(W)ᵀ + b, and with the straight-through gradient grad_x = g · q(W) and
    grad_W = gᵀ · q(x). Where the formats rotate, R, both are rotated before they are rounded, which leaves the
    product alone: y = q(xR) · q(WR)ᵀ + b, and the gradients are rotated back.

    It acts where it is called. A parent that reads ``.weight`` itself (WavLM's attention, Mamba's fused kernels, the
    fast path of nn.TransformerEncoderLayer) computes past it.
    """

    quantization: Quantization

    @staticmethod
    def check(linear: nn.Module) -> None:
        """Do nothing if ``linear`` can be wrapped.

        Raises: SurgeryError if it is not exactly an ``nn.Linear`` (a subclass has a forward of its own), or if
        its forward was replaced by something that would go on computing in full precision.
        """
        if type(linear) is not nn.Linear:
            raise SurgeryError(f"it is a {type(linear).__qualname__}, not nn.Linear itself")
        if "forward" in vars(linear) and not hasattr(linear, "_hf_hook"):
            raise SurgeryError("its forward was replaced on the instance, so that wrapping would have no effect")

    @classmethod
    def wrap(cls, linear: nn.Module, quantization: Quantization) -> None:
        """Turn ``linear`` itself into a QuantLinear; no tensor is copied or made.

        The module object stays the same, so that hooks, optimizers and parents keep what they hold.

        Raises: SurgeryError as ``check``.
        """
        cls.check(linear)
        linear.__class__ = cls
        vars(linear)["quantization"] = quantization
        if hasattr(linear, "_hf_hook"):
            # accelerate's hook calls the forward it found when it was attached.
            vars(linear)["_old_forward"] = cls.forward.__get__(linear)

    def forward(self, input: Tensor) -> Tensor:
        """Return q(x) · q(W)ᵀ + b, or x · Wᵀ + b in a phase in which the layer does not round."""
        how = self.quantization
        if not is_active(self, how.phases):
            return nn.functional.linear(input, self.weight, self.bias)
        refuse_export(self.training)
        return quantized_linear(input, self.weight, self.bias, how)

    # torch.jit.script (seen in torch 2.13) asks each module for what stands for it in a script.
    def __prepare_scriptable__(self) -> None:
        """Refuse to be scripted. Raises: ExportError."""
        refuse_script()

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of the layer."""
        how = self.quantization
        return f"{super().extra_repr()}, weight={how.weight_name}, input={how.input_name}, gradient={how.gradient}"


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Return the QuantLinear modules of ``model`` by their names in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
