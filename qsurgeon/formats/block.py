"""Block formats: an element, and the scales that runs of values share.

A format is data: the code below asks what its fields are, never what it is called.

Sources: OCP Microscaling Formats v1.0, section 6.3 (scale rule ``floor``, NaN); the three other rules are those of
torchao's ScaleCalculationMode; NVIDIA's NVFP4 (block 16, E4M3 scales under one FP32 scale, amax / (6 · 448)).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qsurgeon.errors import FormatError, GradientError, ShapeError, nearest
from qsurgeon.formats.element import ELEMENTS, FP32_MANTISSA, SCALES, Element, PowerOfTwo, Scale
from qsurgeon.formats.packing import pack, unpack

ScaleRule = Literal["floor", "even", "rceil", "ceil", "nearest"]
TensorScale = Literal["none", "by_role", "tensor", "row"]
Gradient = Literal["ste", "clipped", "none"]  # how a gradient passes the rounding

# Below this a tensor scale times the smallest block scale would leave FP32's normal numbers.
SMALLEST_TENSOR_SCALE = 2.0**-100
_MANTISSA_MASK = (1 << FP32_MANTISSA) - 1


def _exponent(amax: Tensor, carry: int) -> Tensor:
    """Return the biased exponent (int32) of ``amax``, after adding ``carry`` to its bits."""
    return (amax.view(torch.int32) + carry) >> FP32_MANTISSA


def _nearest(amax: Tensor, element: Element, scale: Element) -> Tensor:
    # A scale that rounds to zero would lose the block; the smallest above it keeps what it can.
    return scale.encode(scale.round(amax / element.max).clamp_min(scale.smallest)).to(torch.int32)


# Each rule: (largest magnitude of the block, element, scale) -> code of the block's scale, not yet clamped.
_SCALE_RULES: Mapping[str, Callable[[Tensor, Element, Any], Tensor]] = {
    # 2^(floor(log2 amax) - emax), OCP MX v1.0
    "floor": lambda amax, element, scale: _exponent(amax, 0) - element.emax,
    # the same, after rounding amax to the element's mantissa
    "even": lambda amax, element, scale: _exponent(amax, 1 << (FP32_MANTISSA - 1 - element.mantissa)) - element.emax,
    # 2^(ceil(log2 amax) - emax)
    "ceil": lambda amax, element, scale: _exponent(amax, _MANTISSA_MASK) - element.emax,
    # 2^ceil(log2(amax / max)): nothing saturates
    "rceil": lambda amax, element, scale: _exponent(amax / element.max, _MANTISSA_MASK),
    # amax / max, rounded to nearest even
    "nearest": _nearest,
}


@dataclass(frozen=True)
class Format:
    """What values a tensor may take: an element, how many values share a scale, and how the scale is found.

    ``block`` values in a row along the contraction dimension (the last, unless told otherwise) share one scale;
    a row that the block does not divide ends in a shorter block.
    ``scale_rule``: for a power-of-two scale ``floor`` (OCP MX), ``even``, ``rceil`` or ``ceil``; for a float scale
    ``nearest``, amax / max rounded to nearest even.
    ``tensor_scale``: an FP32 scale above the block scales, one per ``tensor`` or per ``row``; ``by_role`` means
    per tensor for a weight and per row for an input, where it must not depend on the rest of the batch.

    Raises: FormatError for fields that do not combine.
    """

    name: str
    element: Element
    block: int
    scale: Scale
    scale_rule: ScaleRule
    tensor_scale: TensorScale = "none"

    def __post_init__(self) -> None:
        if self.block < 1:
            raise FormatError(f"block is {self.block}; at least 1 value must share a scale")
        rules = sorted(set(_SCALE_RULES) - {"nearest"}) if isinstance(self.scale, PowerOfTwo) else ["nearest"]
        if self.scale_rule not in rules:
            raise FormatError(
                f"scale rule '{self.scale_rule}' does not go with scale {self.scale.name}; "
                f"{nearest(self.scale_rule, rules)}"
            )
        if isinstance(self.scale, PowerOfTwo) and self.tensor_scale != "none":
            raise FormatError(
                f"tensor_scale '{self.tensor_scale}' with scale {self.scale.name}: powers of two "
                "span FP32's range already; leave it at 'none'"
            )

    @property
    def bits(self) -> float:
        """Bits per value: the element's, and its share of the block's scale."""
        return self.element.bits + self.scale.bits / self.block

    @cached_property
    def _top_scale(self) -> int:
        """The code of the largest scale that leaves every product with an element finite in FP32."""
        finite = [self.element.max * value <= torch.finfo(torch.float32).max for value in self._scale_magnitudes]
        return sum(finite) - 1

    @property
    def _scale_magnitudes(self) -> tuple[float, ...]:
        return self.scale.values[: self.scale.nan]

    @cached_property
    def as_weight(self) -> "Format":
        """This format where ``by_role`` is decided for a weight: one tensor scale for all of it."""
        return replace(self, tensor_scale="tensor") if self.tensor_scale == "by_role" else self

    @cached_property
    def as_input(self) -> "Format":
        """This format where ``by_role`` is decided for an input: each row (token) has its own tensor scale."""
        return replace(self, tensor_scale="row") if self.tensor_scale == "by_role" else self

    def fake_quantize(self, x: Tensor, dim: int = -1) -> Tensor:
        """Return ``x`` rounded to values of this format, in its own shape and dtype.

        Blocks run along ``dim``. A block of zeros stays zero; one NaN or infinity makes its block NaN, and all
        that shares its tensor scale.

        Raises: ShapeError for a tensor that is not floating point or has no dimension. GradientError for a tensor
        that takes part in autograd: rounding has no gradient, QuantLinear gives it one.
        """
        rows = _rows(x, dim)
        if not x.numel():
            return torch.empty_like(x)
        blocks = _split(rows, self.block)
        scale = self._scale_values(*self._scales(blocks))
        rounded = self.element.round(blocks / scale).mul_(scale)
        return _restore(rounded.flatten(-2)[..., : rows.shape[-1]], dim, x.dtype)

    def quantize(self, x: Tensor, dim: int = -1) -> "Quantized":
        """Return the codes and scales of ``x``; their ``dequantize()`` equals ``fake_quantize(x)``.

        Raises: as ``fake_quantize``.
        """
        rows = _rows(x, dim)
        blocks = _split(rows, self.block)
        scale, tensor_scale = self._scales(blocks)
        values = self._scale_values(scale, tensor_scale)
        codes = self.element.encode(self.element.round(blocks / values)).flatten(-2)[..., : rows.shape[-1]]
        return Quantized(
            codes.movedim(-1, dim),
            scale.squeeze(-1).movedim(-1, dim),
            None if tensor_scale is None else tensor_scale[..., 0, 0],
            self,
            x.dtype,
            dim,
        )

    def saturates(self, x: Tensor, dim: int = -1) -> Tensor:
        """Return where (bool, the shape of ``x``) a value exceeds the largest its block can hold.

        Raises: ShapeError as ``fake_quantize``.
        """
        rows = _rows(x.detach(), dim)
        blocks = _split(rows, self.block)
        limit = self._scale_values(*self._scales(blocks)).mul_(self.element.max)
        return (blocks.abs() > limit).flatten(-2)[..., : rows.shape[-1]].movedim(-1, dim)

    def _scales(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the codes of the blocks' scales (..., n, 1), uint8, and the tensor scale (..., 1, 1) or None."""
        amax = blocks.abs().amax(-1, keepdim=True)
        tensor_scale = None
        if self.tensor_scale != "none":
            tensor_scale = self._tensor_scale(amax)
            amax = amax / tensor_scale
        code = _SCALE_RULES[self.scale_rule](amax, self.element, self.scale).clamp(0, self._top_scale)
        return torch.where(amax.isfinite(), code, self.scale.nan).to(torch.uint8), tensor_scale

    def _tensor_scale(self, amax: Tensor) -> Tensor:
        """Return the FP32 scale that lets the largest block scale be the scale element's largest value."""
        if self.tensor_scale == "row":
            top = amax.amax(-2, keepdim=True) if amax.shape[-2] else amax.sum(-2, keepdim=True)
        else:
            top = amax.amax() if amax.numel() else amax.sum()
            top = top.reshape([1] * amax.dim())
        return (top / (self.element.max * self._scale_magnitudes[-1])).clamp_min(SMALLEST_TENSOR_SCALE)

    def _scale_values(self, scale: Tensor, tensor_scale: Tensor | None) -> Tensor:
        values = self.scale.decode(scale)
        return values if tensor_scale is None else values * tensor_scale

    def to_dict(self) -> dict[str, str | int]:
        """Return the fields by name, as a checkpoint's config.json keeps them."""
        return {
            "element": self.element.name,
            "block": self.block,
            "scale": self.scale.name,
            "scale_rule": self.scale_rule,
            "tensor_scale": self.tensor_scale,
        }

    def with_fields(self, name: str, **fields: str | int) -> "Format":
        """Return this format under another name with some fields, given as in ``to_dict``, replaced.

        Raises: FormatError for an unknown field or value, and for fields that do not combine.
        """
        values = {**self.to_dict(), **fields}
        for field, known in FIELDS.items():
            if known and values[field] not in known:
                raise FormatError(
                    f"no {field.replace('_', ' ')} '{values[field]}'; {nearest(str(values[field]), known)}"
                )
        unknown = sorted(set(values) - set(FIELDS))
        if unknown:
            raise FormatError(f"a format has no field '{unknown[0]}'; {nearest(unknown[0], FIELDS)}")
        return Format(
            name,
            ELEMENTS[str(values["element"])],
            int(values["block"]),
            SCALES[str(values["scale"])],
            values["scale_rule"],  # type: ignore[arg-type]  # checked against FIELDS above
            values["tensor_scale"],  # type: ignore[arg-type]
        )


# The fields a recipe may set, each with the names it may take; none for a number.
FIELDS: dict[str, tuple[str, ...]] = {
    "element": tuple(ELEMENTS),
    "block": (),
    "scale": tuple(SCALES),
    "scale_rule": get_args(ScaleRule),
    "tensor_scale": get_args(TensorScale),
}


@dataclass(frozen=True)
class Quantized:
    """The codes and scales of a tensor.

    codes: uint8, the tensor's shape, one code a value. scale: uint8, one code a block, blocks along ``dim``.
    tensor_scale: float32, () or one a row, or None. dtype: what ``dequantize`` returns.
    """

    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor | None
    format: Format
    dtype: torch.dtype
    dim: int = -1

    def dequantize(self) -> Tensor:
        """Return the values, in the shape and dtype of the tensor that was quantized."""
        format, length = self.format, self.codes.shape[self.dim]
        scale = format.scale.decode(self.scale.movedim(self.dim, -1))
        if self.tensor_scale is not None:
            scale = scale * self.tensor_scale[..., None]
        values = format.element.decode(self.codes.movedim(self.dim, -1))
        values *= scale.repeat_interleave(format.block, dim=-1)[..., :length]
        return _restore(values, self.dim, self.dtype)

    def packed(self) -> Tensor:
        """Return the codes as bytes, packed along ``dim``: see ``formats.packing``."""
        return pack(self.codes.movedim(self.dim, -1), self.format.element.bits).movedim(-1, self.dim)


def unpacked(
    data: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    format: Format,
    *,
    length: int,
    dtype: torch.dtype,
    dim: int = -1,
) -> Quantized:
    """Return what ``Quantized.packed`` packed; ``length`` is the number of values along ``dim``."""
    codes = unpack(data.movedim(dim, -1), format.element.bits, length).movedim(-1, dim)
    return Quantized(codes, scale, tensor_scale, format, dtype, dim)


def _rows(x: Tensor, dim: int) -> Tensor:
    """Return ``x`` in float32 with the contraction dimension last, refusing what cannot be quantized."""
    if not x.is_floating_point() or x.element_size() == 1:
        raise ShapeError(f"cannot quantize a tensor of {x.dtype}; expected float32, bfloat16, float16 or float64")
    if x.dim() == 0:
        raise ShapeError("cannot quantize a tensor without dimensions; blocks run along one")
    if torch.is_grad_enabled() and x.requires_grad:
        raise GradientError(
            "fake quantization has no gradient of its own: use QuantLinear (or layers.straight_through), "
            "or call it under torch.no_grad()"
        )
    return x.to(torch.float32).movedim(dim, -1)


def _split(rows: Tensor, block: int) -> Tensor:
    missing = -rows.shape[-1] % block
    padded = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
    return padded.reshape(*padded.shape[:-1], padded.shape[-1] // block, block)  # (..., k) -> (..., k/block, block)


def _restore(rows: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max  # rounding up the largest values of a narrow dtype must not make infinity
    return rows.clamp(-limit, limit).to(dtype).movedim(-1, dim)
