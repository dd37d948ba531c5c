"""QuantLinear: a Linear that multiplies rounded inputs with a rounded weight."""

from torch import Tensor, nn
from torch.nn import Parameter

from qsurgeon.errors import SurgeryError
from qsurgeon.layers.export import refuse_export, refuse_script
from qsurgeon.layers.phases import is_active
from qsurgeon.layers.product import quantized_linear
from qsurgeon.layers.quantization import Quantization
from qsurgeon.layers.sharded import Layer, is_sharded, on_mesh, refuse_part, sharded_linear


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
    name: str = ""  # in the plain model, for errors; empty where it is not known

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
    def wrap(cls, linear: nn.Module, quantization: Quantization, name: str = "") -> None:
        """Turn ``linear`` itself into a QuantLinear; no tensor is copied or made. ``name``: see the class.

        The module object stays the same, so that hooks, optimizers and parents keep what they hold.

        Raises: SurgeryError as ``check``.
        """
        cls.check(linear)
        linear.__class__ = cls
        vars(linear).update(quantization=quantization, name=name)
        if hasattr(linear, "_hf_hook"):
            # accelerate's hook calls the forward it found when it was attached.
            vars(linear)["_old_forward"] = cls.forward.__get__(linear)

    def forward(self, input: Tensor) -> Tensor:
        """Return q(x) · q(W)ᵀ + b, or x · Wᵀ + b in a phase in which the layer does not round."""
        how, weight = self.quantization, self.weight
        # Of another type: a DTensor, or what a hook or a parametrization computed.
        is_split = type(weight) is not Parameter and is_sharded(weight)
        if not is_active(self, how.behavior.phases):
            return nn.functional.linear(on_mesh(input, weight) if is_split else input, weight, self.bias)
        refuse_export(self.training)
        if is_split:
            return sharded_linear(input, weight, self.bias, self._described())
        rows, columns = weight.shape
        if rows < self.out_features or columns < self.in_features:
            refuse_part(self._described(), weight)
        return quantized_linear(input, weight, self.bias, how, name=self.name)

    def _described(self) -> Layer:
        return Layer(self.name or type(self).__name__, self.in_features, self.out_features, self.quantization)

    # torch.jit.script (seen in torch 2.13) asks each module for what stands for it in a script.
    def __prepare_scriptable__(self) -> None:
        """Refuse to be scripted. Raises: ExportError."""
        refuse_script()

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of the layer."""
        how = self.quantization
        behavior = "".join(
            f", {name}={value}" for name, value in {**how.behavior.columns, **how.behavior.differing}.items()
        )
        return f"{super().extra_repr()}, weight={how.weight_name}, input={how.input_name}{behavior}"


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Return the QuantLinear modules of ``model`` by their names in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
