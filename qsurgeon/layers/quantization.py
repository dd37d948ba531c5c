"""How one module computes: what a rule comes to."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qsurgeon.formats import Format, check_operands
from qsurgeon.formats.rotation import Rotation
from qsurgeon.words import Gradient, Phases, SavedInputs

AS_IT_IS = "-"


@dataclass(frozen=True)
class Quantization:
    """What a rule gives a module.

    Formats (None leaves the tensor as it is), how the gradient passes the rounding, the rule's name, in which phases
    the module rounds, and how it keeps what its backward pass needs of the input.

    Raises: FormatError for two formats that cannot be a product's.
    """

    weight: Format | None
    input: Format | None
    gradient: Gradient = "ste"
    rule: str = ""
    phases: Phases = "both"
    saved_inputs: SavedInputs = "packed"

    def __post_init__(self) -> None:
        check_operands(self.weight, self.input)
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
        """In which phases the module rounds, as tables say it; nothing where it always does."""
        return "" if self.phases == "both" else f"in {self.phases} only"


def _number(format: Format | None) -> Tensor | None:
    """Return a static scale as a tensor: torch.compile takes one as an input, and a float as a part of the graph.

    Layers that differ in their numbers alone share a graph so.
    """
    if format is None or format.static_scale is None:
        return None
    with torch.inference_mode(False):
        return torch.tensor(format.static_scale, dtype=torch.float32, device="cpu")
