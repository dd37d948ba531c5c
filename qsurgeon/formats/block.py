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
from qsurgeon.formats.element import E8M0, ELEMENTS, EXPONENT_MASK, FP32_MANTISSA, SCALES, Element, PowerOfTwo, Scale
from qsurgeon.formats.packing import pack, unpack

ScaleRule = Literal["floor", "even", "rceil", "ceil", "nearest"]
TensorScale = Literal["none", "by_role", "tensor", "row"]
Gradient = Literal["ste", "clipped", "none"]  # how a gradient passes the rounding

# Below this a tensor scale times the smallest block scale would leave FP32's normal numbers.
SMALLEST_TENSOR_SCALE = 2.0**-100
PIECE = 2**17  # values worked on at a time, so that what is made in between stays in the cache
_MANTISSA_MASK = (1 << FP32_MANTISSA) - 1


def _power(amax: Tensor, carry: int) -> Tensor:
    """Return the power of two at or below ``amax`` (0 below FP32's normal numbers), its bits raised by ``carry``."""
    return (amax.view(torch.int32) + carry).bitwise_and_(EXPONENT_MASK).view(torch.float32)


def _power_above(x: Tensor) -> Tensor:
    """Return the power of two at or above ``x``, or 0 where that is below all scales."""
    return torch.where(x > E8M0.smallest, _power(x, _MANTISSA_MASK), 0)


# Each rule: (largest magnitude of the block, element, scale) -> the block's scale, before it is clamped.
_SCALE_RULES: Mapping[str, Callable[[Tensor, Element, Any], Tensor]] = {
    # 2^(floor(log2 amax) - emax), OCP MX v1.0
    "floor": lambda amax, element, scale: _power(amax, 0) * 2.0**-element.emax,
    # the same, after rounding amax to the element's mantissa
    "even": lambda amax, element, scale: _power(amax, 1 << (FP32_MANTISSA - 1 - element.mantissa)) * 2.0**-element.emax,
    # 2^(ceil(log2 amax) - emax)
    "ceil": lambda amax, element, scale: _power_above(amax) * 2.0**-element.emax,
    # 2^ceil(log2(amax / max)): nothing saturates
    "rceil": lambda amax, element, scale: _power_above(amax / element.max),
    # amax / max, rounded to nearest even
    "nearest": lambda amax, element, scale: scale.round(amax / element.max),
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
        if self.tensor_scale not in FIELDS["tensor_scale"]:
            raise FormatError(
                f"no tensor scale '{self.tensor_scale}'; {nearest(self.tensor_scale, FIELDS['tensor_scale'])}"
            )
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
        # Computed now: torch.compile cannot trace the lock that a cached property takes the first time.
        _ = (self.as_weight, self.as_input, self._largest_scale, self.element.values, self.scale.values)

    @property
    def bits(self) -> float:
        """Bits per value: the element's, and its share of the block's scale."""
        return self.element.bits + self.scale.bits / self.block

    @cached_property
    def _largest_scale(self) -> float:
        """The largest scale whose products with the element are finite in FP32."""
        limit = torch.finfo(torch.float32).max / self.element.max
        return max(value for value in self.scale.values if 0 < value <= limit)

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
        tensor_scale = self._tensor_scale(rows)
        if torch.compiler.is_compiling():  # the compiler makes one loop of it all
            return self._rounded(rows, tensor_scale).movedim(-1, dim)
        flat = rows.reshape(-1, rows.shape[-1]) if x.numel() else rows.reshape(0, 1)
        scales = None if tensor_scale is None else tensor_scale.expand(*rows.shape[:-1], 1).reshape(-1, 1)
        result = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
        into = result.view(flat.shape)
        step = max(1, PIECE // flat.shape[1])
        for start in range(0, flat.shape[0], step):
            piece = slice(start, start + step)
            into[piece] = self._rounded(flat[piece], None if scales is None else scales[piece])
        return result.movedim(-1, dim)

    def _rounded(self, rows: Tensor, tensor_scale: Tensor | None) -> Tensor:
        """Return ``rows`` (..., k) rounded; ``tensor_scale`` is (..., 1), or None."""
        blocks = _split(rows, self.block)
        scale = _product(self._scales(blocks, tensor_scale), tensor_scale)
        values = self.element.round(_divided(blocks, scale)).mul_(scale).flatten(-2)[..., : rows.shape[-1]]
        return _narrowed(values, rows.dtype)

    def quantize(self, x: Tensor, dim: int = -1) -> "Quantized":
        """Return the codes and scales of ``x``; their ``dequantize()`` equals ``fake_quantize(x)``.

        Raises: as ``fake_quantize``.
        """
        rows = _rows(x, dim)
        tensor_scale = self._tensor_scale(rows)
        blocks = _split(rows, self.block)
        scale = self._scales(blocks, tensor_scale)
        values = _product(scale, tensor_scale)
        codes = self.element.encode(self.element.round(_divided(blocks, values))).flatten(-2)[..., : rows.shape[-1]]
        if tensor_scale is not None:
            tensor_scale = tensor_scale.squeeze(-1) if self.tensor_scale == "row" else tensor_scale.reshape(())
        encoded = self.scale.encode(scale).squeeze(-1)
        return Quantized(codes.movedim(-1, dim), encoded.movedim(-1, dim), tensor_scale, self, x.dtype, dim)

    def saturates(self, x: Tensor, dim: int = -1) -> Tensor:
        """Return where (bool, the shape of ``x``) a value exceeds the largest its block can hold.

        Raises: ShapeError as ``fake_quantize``.
        """
        rows = _rows(x.detach(), dim)
        tensor_scale = self._tensor_scale(rows)
        blocks = _split(rows, self.block)
        limit = self._scales(blocks, tensor_scale).mul_(self.element.max)
        if tensor_scale is not None:
            # That FP32 rounds the scales' product is no saturation.
            limit = limit * tensor_scale[..., None] * (1 + 2.0**-20)
        return (blocks.abs() > limit).flatten(-2)[..., : rows.shape[-1]].movedim(-1, dim)

    def _scales(self, blocks: Tensor, tensor_scale: Tensor | None) -> Tensor:
        """Return the value of each block's scale, (..., n, 1); the tensor scale is divided out."""
        amax = blocks.abs().amax(-1, keepdim=True)
        if tensor_scale is not None:
            amax = amax / tensor_scale[..., None]
        scale = _SCALE_RULES[self.scale_rule](amax, self.element, self.scale)
        # A scale that comes out as zero would lose the block; the smallest there is keeps what it can.
        scale = scale.clamp(self.scale.smallest, self._largest_scale)
        return torch.where(amax.isfinite(), scale, torch.nan)

    def _tensor_scale(self, rows: Tensor) -> Tensor | None:
        """Return the FP32 scale that lets the largest block scale be the scale element's largest value.

        (..., 1) where each row has its own, (1, …, 1) where the tensor has one.
        """
        if self.tensor_scale == "none":
            return None
        shape = [*rows.shape[:-1], 1] if self.tensor_scale == "row" else [1] * rows.dim()
        if not rows.numel():
            top = rows.new_zeros(shape)
        elif self.tensor_scale == "row":
            top = torch.maximum(rows.amax(-1), -rows.amin(-1)).reshape(shape)
        else:
            top = torch.maximum(rows.amax(), -rows.amin()).reshape(shape)
        largest = self.element.max * self._largest_scale
        return (top.to(torch.float32) / largest).clamp_min(SMALLEST_TENSOR_SCALE)

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
        if type(values["block"]) is not int:
            raise FormatError(f"block is {values['block']!r}; expected a whole number")
        return Format(
            name,
            ELEMENTS[str(values["element"])],
            values["block"],
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
        scale = _product(format.scale.decode(self.scale.movedim(self.dim, -1)), self.tensor_scale)
        values = format.element.decode(self.codes.movedim(self.dim, -1))
        values *= scale.repeat_interleave(format.block, dim=-1)[..., :length]
        return _narrowed(values, self.dtype).movedim(-1, self.dim)

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
    """Return ``x`` with the contraction dimension last, refusing what cannot be quantized."""
    if not x.is_floating_point() or x.element_size() == 1:
        raise ShapeError(f"cannot quantize a tensor of {x.dtype}; expected float32, bfloat16, float16 or float64")
    if x.dim() == 0:
        raise ShapeError("cannot quantize a tensor without dimensions; blocks run along one")
    if torch.is_grad_enabled() and x.requires_grad:
        raise GradientError(
            "fake quantization has no gradient of its own: use QuantLinear (or layers.straight_through), "
            "or call it under torch.no_grad()"
        )
    return x.movedim(dim, -1)


def _split(rows: Tensor, block: int) -> Tensor:
    """Return ``rows`` in FP32 as blocks: (..., k) -> (..., ceil(k/block), block), the last padded with zeros."""
    rows = rows.to(torch.float32)
    missing = -rows.shape[-1] % block
    padded = torch.nn.functional.pad(rows, (0, missing)) if missing else rows
    return padded.reshape(*padded.shape[:-1], padded.shape[-1] // block, block)


def _product(scale: Tensor, tensor_scale: Tensor | None) -> Tensor:
    """Return the blocks' scales times the tensor scale above them, which has one dimension less."""
    return scale if tensor_scale is None else scale * tensor_scale[..., None]


def _divided(blocks: Tensor, scale: Tensor) -> Tensor:
    """Return ``blocks / scale``; a zero block stays 0 also where denormals are flushed and its scale reads as 0."""
    return blocks / torch.where(scale == 0, 1, scale)


def _narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return FP32 ``values`` in ``dtype``; rounding up the largest of a narrow one must not make infinity."""
    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return values.clamp(-limit, limit).to(dtype)
