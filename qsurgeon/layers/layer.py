"""What wrapped layers of all kinds share: their weights by name, and how they become wrapped and plain again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from qsurgeon.errors import SurgeryError
from qsurgeon.layers.export import refuse_script
from qsurgeon.layers.phases import is_active
from qsurgeon.layers.quantization import Quantization
from qsurgeon.layers.sharded import Layer

_LAST, _FIRST = -1, -2
USUAL = "weight"  # what torch calls the weight of a module that has one


@dataclass(frozen=True)
class Weight:
    """One weight of a layer, as the layer declares it.

    name: of its parameter. contraction: which of the parameter's last two dimensions the product sums over: -1 for
    (…, outputs, inputs), -2 for (…, inputs, outputs). Dimensions before them count matrices, such as experts.
    takes_input: whether it is multiplied with what the layer is called with, and not with something made inside.
    """

    name: str = USUAL
    contraction: int = _LAST
    takes_input: bool = True

    @property
    def is_transposed(self) -> bool:
        """Whether the parameter is (…, inputs, outputs)."""
        return self.contraction == _FIRST

    def rows(self, tensor: Tensor) -> Tensor:
        """Return a view of the parameter as (…, outputs, inputs); of such a tensor, one in the parameter's layout."""
        return tensor.mT if self.is_transposed else tensor

    def row_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that ``rows`` gives a tensor of ``shape``."""
        return (*shape[:-2], shape[-1], shape[-2]) if self.is_transposed else tuple(shape)


ONE = Weight()  # of a module that has one, as (outputs, inputs)


class QuantLayer(nn.Module):
    """A module that was wrapped in place: it multiplies rounded inputs with rounded weights.

    source: the class that it was, and is a subclass of. weights: what can be rounded in it. The parameters, their names
    and their shapes are those of ``source``, unless they are packed.
    """

    source: ClassVar[type[nn.Module]]
    weights: ClassVar[tuple[Weight, ...]]
    # Of a layer that has one weight; see ``quantizations`` for others.
    quantization: Quantization
    weight: Any
    bias: Any
    name: str = ""  # in the plain model, for errors; empty where it is not known

    @classmethod
    def source_name(cls) -> str:
        """Return what users call the class that is wrapped."""
        is_of_torch = cls.source.__module__.startswith("torch.nn.")
        return f"nn.{cls.source.__name__}" if is_of_torch else cls.source.__name__

    @classmethod
    def check(cls, module: nn.Module) -> None:
        """Do nothing if ``module`` can be wrapped.

        Raises: SurgeryError if it is not exactly of the source class (a subclass has a forward of its own), or if
        its forward was replaced by something that would go on computing in full precision.
        """
        if type(module) is not cls.source:
            raise SurgeryError(f"it is a {type(module).__qualname__}, not {cls.source_name()} itself")
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            raise SurgeryError("its forward was replaced on the instance, so that wrapping would have no effect")

    @classmethod
    def check_all(cls, module: nn.Module, hows: Mapping[str, Quantization]) -> None:
        """Do nothing if ``module`` can be wrapped so that its weights compute as ``hows`` say, by their names.

        Raises: as ``check``, and what the layer's own kind of storage raises.
        """
        cls.check(module)

    @classmethod
    def take(cls, module: nn.Module, hows: Mapping[str, Quantization], name: str = "") -> None:
        """Turn ``module`` itself into a layer of this class; see ``check_all`` for ``hows``, the class for ``name``.

        Raises: as ``check_all``.
        """
        cls.check(module)
        cls._become(module, name)
        layer: Any = module
        layer.quantize_as(hows)

    @classmethod
    def _become(cls, module: nn.Module, name: str) -> None:
        """Change the class of ``module``, which stays the same object for the hooks, optimizers and parents it has."""
        module.__class__ = cls
        vars(module)["name"] = name
        if hasattr(module, "_hf_hook"):
            # accelerate's hook calls the forward it found when it was attached.
            vars(module)["_old_forward"] = cls.forward.__get__(module)

    def quantize_as(self, hows: Mapping[str, Quantization]) -> None:
        """Let the weights compute as ``hows`` say, by their names, from now on."""
        vars(self)["_quantizations"] = dict(hows)

    @property
    def quantizations(self) -> Mapping[str, Quantization]:
        """How the weights compute, by their names; one that is not there stays as it is."""
        hows: Mapping[str, Quantization] = vars(self)["_quantizations"]
        return hows

    def unwrap(self) -> None:
        """Become what the layer was before it was wrapped."""
        self.__class__ = self.source  # type: ignore[assignment]
        for key in ("quantization", "_quantizations"):
            vars(self).pop(key, None)
        if "_old_forward" in vars(self):
            vars(self)["_old_forward"] = self.source.forward.__get__(self)

    @property
    def rounds(self) -> bool:
        """Whether it rounds when it is called now: the phase is one of a rule's, and it is not disabled."""
        return any(is_active(self, how.behavior.phases) for how in self.quantizations.values())

    # torch.jit.script (seen in torch 2.13) asks each module for what stands for it in a script.
    def __prepare_scriptable__(self) -> None:
        """Refuse to be scripted. Raises: ExportError."""
        refuse_script()


class QuantProduct(QuantLayer):
    """A wrapped layer that is one product: of its input and of its one weight, q(x) · q(W)ᵀ + b."""

    weights = (ONE,)

    @classmethod
    def wrap(cls, module: nn.Module, quantization: Quantization, name: str = "") -> None:
        """Turn ``module`` itself into a layer of this class; no tensor is copied or made. ``name``: see the class.

        The module object stays the same, so that hooks, optimizers and parents keep what they hold.

        Raises: SurgeryError as ``check``.
        """
        cls.check(module)
        cls._become(module, name)
        vars(module)["quantization"] = quantization

    @classmethod
    def take(cls, module: nn.Module, hows: Mapping[str, Quantization], name: str = "") -> None:
        """Turn ``module`` itself into a layer of this class. Raises: as ``wrap``."""
        cls.wrap(module, hows[cls.weights[0].name], name)

    def quantize_as(self, hows: Mapping[str, Quantization]) -> None:
        """Let the weight compute as ``hows`` says of it from now on."""
        vars(self)["quantization"] = hows[self.weights[0].name]

    @property
    def quantizations(self) -> Mapping[str, Quantization]:
        """How the weight computes, by its name."""
        return {self.weights[0].name: self.quantization}

    @property
    def features(self) -> tuple[int, int]:
        """How many outputs and inputs the layer has."""
        raise NotImplementedError

    def _described(self) -> Layer:
        outputs, inputs = self.features
        return Layer(self.name or type(self).__name__, inputs, outputs, self.quantization)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of the layer."""
        how = self.quantization
        said = {"weight": how.weight_name, "input": how.input_name, **how.behavior.columns, **how.behavior.differing}
        own = ", ".join(f"{name}={value}" for name, value in said.items())
        return ", ".join(filter(None, (super().extra_repr(), own)))


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Return the wrapped layers of ``model``, of all kinds, by their names in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}
