"""How one module computes: what a rule comes to."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qsurgeon.formats import Format, check_operands
from qsurgeon.formats.rotation import Rotation
from qsurgeon.words import Behavior, Gradient

AS_IT_IS = "-"
_PLAIN = Behavior()


@dataclass(frozen=True, init=False)
class Quantization:
    """What a rule gives a module: formats (None leaves the tensor as it is), how it uses them, and the rule's name.

    ``behavior`` may be the gradient alone, as a word; ``said`` are fields of the behavior.

    Raises: FormatError for two formats that cannot be a product's.
    """

    weight: Format | None
    input: Format | None
    behavior: Behavior
    rule: str

    def __init__(
        self,
        weight: Format | None,
        input: Format | None,
        behavior: Behavior | Gradient = _PLAIN,
        rule: str = "",
        **said: Any,
    ) -> None:
        if isinstance(behavior, str):
            behavior = Behavior(gradient=behavior)
        if said:
            behavior = Behavior(**{**behavior.fields, **said})
        vars(self).update(weight=weight, input=input, behavior=behavior, rule=rule)
        check_operands(weight, input)
        _ = (self.rotation, self.input_grid, self.weight_grid)  # computed now: see Fields
        _ = (self.input_number, self.weight_number)

    @cached_property
    def rotation(self) -> Rotation | None:
        """How both operands are rotated, the one that stays in full precision too."""
        rotations = (one.rotation for one in (self.weight, self.input) if one is not None)
        return next(rotations, None)

    @cached_property
    def input_grid(self) -> Format | None:
        """How an input is rounded once it is rotated."""
        return None if self.input is None else self.input.as_input.without_rotation

    @cached_property
    def weight_grid(self) -> Format | None:
        """How a weight is rounded once it is rotated."""
        return None if self.weight is None else self.weight.as_weight.without_rotation

    @cached_property
    def input_number(self) -> Tensor | None:
        """The number of the input's static tensor scale, (), or None; see ``_number``."""
        return _number(self.input)

    @cached_property
    def weight_number(self) -> Tensor | None:
        """The number of the weight's static tensor scale, (), or None; see ``_number``."""
        return _number(self.weight)

    @property
    def static_scales(self) -> dict[str, float]:
        """The numbers of static tensor scales, by operand (``weight``, ``input``)."""
        formats = {"weight": self.weight, "input": self.input}
        return {role: one.static_scale for role, one in formats.items() if one and one.static_scale is not None}

    @property
    def weight_name(self) -> str:
        """The weight's format, as tables show it."""
        return self.weight.name if self.weight else AS_IT_IS

    @property
    def input_name(self) -> str:
        """The input's format, as tables show it."""
        return self.input.name if self.input else AS_IT_IS

    @property
    def when(self) -> str:
        """What else its forward pass depends on, in words, such as the phases in which it rounds."""
        return ", ".join(self.behavior.reasons(forward=True))

    @property
    def why(self) -> str:
        """The rule, and what else it says, in words."""
        return ", ".join([f"rule '{self.rule}'", *self.behavior.reasons()])


def _number(format: Format | None) -> Tensor | None:
    """Return a static scale as a tensor: torch.compile takes one as an input, and a float as a part of the graph.

    Layers that differ in their numbers alone share a graph so.
    """
    if format is None or format.static_scale is None:
        return None
    with torch.inference_mode(False):
        return torch.tensor(format.static_scale, dtype=torch.float32, device="cpu")
