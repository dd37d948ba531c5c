"""Which formats both sides of the border have: what is stored of them, apart from how it was found.

A file of another tool says how codes and scales are read. No reader asks by which rule a scale was found, in which
direction a value was rounded, and whether the largest value of a block stands at 6 or at 4.
"""

from dataclasses import dataclass

from qsurgeon.formats import Format, get_format
from qsurgeon.formats.fields import NONE


@dataclass(frozen=True)
class Grid:
    """What is stored of a format: the element, the block, its scale, and what has a tensor scale of its own."""

    element: str
    block: str
    scale: str
    above: str

    @classmethod
    def of_weight(cls, format: Format) -> "Grid":
        """Return what is stored of a weight in ``format``."""
        own = format.as_weight
        return cls._of(own, NONE if own.tensor_scale == NONE else "row" if own.has_row_scales else "tensor")

    @classmethod
    def of_input(cls, format: Format) -> "Grid":
        """Return how an input in ``format`` is read; above: ``row`` (a token), ``static``, ``tensor`` or ``none``."""
        return cls._of(format.as_input, format.as_input.tensor_scale)

    @classmethod
    def _of(cls, format: Format, above: str) -> "Grid":
        fields = format.to_dict()
        return cls(fields["element"], str(fields["block"]), fields["scale"], above)


_WEIGHTS = {
    Grid.of_weight(get_format(name)): name
    for name in (
        "mxfp4", "nvfp4", "mxfp8", "mxfp6_e2m3", "fp8_e4m3", "fp8_e4m3_row", "fp8_e4m3_128x128", "int8", "int4_b32",
        "int4_b64", "int4_b128",
    )
}  # fmt: skip
_INPUTS = {
    Grid("e2m1", "32", "e8m0", NONE): "mxfp4",
    Grid("e2m1", "16", "e4m3", "row"): "nvfp4, a scale per token",
    Grid("e2m1", "16", "e4m3", "tensor"): "nvfp4, a scale per batch",
    Grid("e2m1", "16", "e4m3", "static"): "nvfp4, a static scale",
    Grid("e4m3", "32", "e8m0", NONE): "mxfp8",
    Grid("e4m3", "128", "fp32", NONE): "fp8, a scale per 128",
    Grid("e4m3", NONE, NONE, "row"): "fp8, a scale per token",
    Grid("e4m3", NONE, NONE, "static"): "fp8, a static scale",
    Grid("int8", NONE, NONE, "row"): "int8, a scale per token",
}


def weight_grid(format: Format) -> str:
    """Return the name of what a weight in ``format`` is stored as; nothing for what no other tool has.

    That of a rotated weight is nothing: whoever reads it must rotate the input.
    """
    return "" if format.hadamard is not None else _WEIGHTS.get(Grid.of_weight(format), "")


def input_grid(format: Format) -> str:
    """Return the name of how an input in ``format`` is rounded; nothing for what no other tool has."""
    return "" if format.hadamard is not None else _INPUTS.get(Grid.of_input(format), "")
