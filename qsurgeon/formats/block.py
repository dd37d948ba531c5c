"""Formats at work: quantize, dequantize, fake quantize. A format is data, see fields.py; kernels/ computes."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qsurgeon.errors import FormatError, GradientError, ShapeError
from qsurgeon.formats import given, kernels
from qsurgeon.formats.fields import NONE, Fields
from qsurgeon.formats.given import Scales
from qsurgeon.formats.kernels import arithmetic
from qsurgeon.formats.packing import pack, packed_length, unpack
from qsurgeon.formats.rotation import Rotation, rotated
from qsurgeon.formats.tensor_scale import above_of, kept
from qsurgeon.torch_private import has_tangent


@dataclass(frozen=True)
class Format(Fields):
    """What values a tensor may take, and how to round to them; the fields are described by ``Fields``.

    A tensor scale ``by_role`` (nvfp4) is one number for a weight and one a row for an input. A layer rounds its weight
    as ``as_weight`` and its input as ``as_input``, each a format of its own: ``get_format("nvfp4").as_input
    .fake_quantize(x)`` is what a layer multiplies its weight with. What is asked of the format itself is of a weight.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.rotation

    def __repr__(self) -> str:
        fields = {field: value for field, value in self.to_dict().items() if value not in (NONE, False, 0)}
        role = "; rounds as_weight, one tensor scale; as_input has one a row" if self.depends_on_role else ""
        return f"Format({self.name}: {', '.join(f'{field} {value}' for field, value in fields.items())}{role})"

    @cached_property
    def rotation(self) -> Rotation | None:
        """The rotation before rounding, if there is one."""
        return None if self.hadamard is None else Rotation(self.hadamard, self.seed)

    def fake_quantize(self, x: Tensor, dim: int = -1) -> Tensor:
        """Return ``x`` rounded to values of this format, in its own shape and dtype.

        Where the tensor scale is ``by_role`` (nvfp4) ``x`` is rounded as a weight, under one scale for all of it. A
        layer rounds its input under one a row: for that, call ``as_input.fake_quantize(x)``.

        Blocks run along ``dim``. A block of zeros stays zero; one NaN or infinity makes its block NaN, and all
        that shares its tensor scale. With a rotation the values are those of the format where they are rotated,
        and are rotated back.

        Raises: ShapeError for a tensor that is not floating point or not strided, has no dimension, or rows that the
        rotation does not fit. GradientError for a tensor that takes part in autograd, backward or forward: rounding has
        no gradient, QuantLinear gives it one. FormatError where a static tensor scale has no number.
        """
        rows = rotated(_rows(x, dim), self.rotation)
        self._check_number()
        values = kernels.fake_quantize(rows, self)
        if self.rotation is not None:
            values = arithmetic.narrowed(self.rotation.back(values), x.dtype)
        return _shaped(values, x, dim)

    def quantize(self, x: Tensor, dim: int = -1, *, top: Tensor | None = None) -> "Quantized":
        """Return the packed codes and scales of ``x``; their ``dequantize()`` equals ``fake_quantize(x)``.

        As there, ``by_role`` is decided for a weight; for an input, call ``as_input.quantize(x)``.

        ``top``: what ``peak`` says of the whole tensor, where ``x`` is a slab of it and all of it shares one tensor
        scale. Slabs of whole rows (and whole blocks) then have the codes and scales that they have in the whole, unless
        rounding is stochastic, which depends on the place.

        Raises: as ``fake_quantize``.
        """
        rows = rotated(_rows(x, dim), self.rotation)
        self._check_number()
        if top is None:
            data, scale, above = kernels.quantize(rows, self)
        else:
            data, scale, above = kernels.quantize(rows, self, arithmetic.scale_of(top.reshape([1] * rows.dim()), self))
        own = None if above is None else kept(above, x.movedim(dim, -1).shape[:-1], self)
        if scale is not None:
            scale = _shaped(scale, x, dim)
        return Quantized(_shaped(data, x, dim), scale, own, self, x.dtype, x.shape[dim], dim)

    def peak(self, x: Tensor, dim: int = -1) -> Tensor | None:
        """Return the largest magnitude (float32, ()) of ``x``, NaN if it has one, as the format rotates it.

        None where no tensor scale depends on all values. Raises: ShapeError as ``fake_quantize``.
        """
        if self.as_weight.tensor_scale != "tensor":
            return None
        return arithmetic.largest(rotated(_rows(x, dim), self.rotation), self.as_weight).reshape(())

    def saturates(self, x: Tensor, dim: int = -1) -> Tensor:
        """Return where (bool, the shape of ``x``) a value exceeds the largest its block can hold.

        As in ``fake_quantize``, ``by_role`` is decided for a weight; for an input, call ``as_input.saturates(x)``.

        Raises: ShapeError as ``fake_quantize``; FormatError for a format with a rotation, whose values are others.
        """
        if self.rotation is not None:
            raise FormatError(
                f"format '{self.name}' rotates values before it rounds them; ask its without_rotation, of rotated ones"
            )
        rows = _rows(x.detach(), dim)
        self._check_number()
        return _shaped(kernels.saturates(rows, self), x, dim)

    def scales(self, x: Tensor, dim: int = -1) -> Scales:
        """Return the scales under which ``fake_quantize`` and ``quantize`` round ``x``, as numbers.

        As there, ``by_role`` is decided for a weight; for an input, call ``as_input.scales(x)``. Raises: as there.
        """
        found = self.quantize(x, dim)
        block = None if found.scale is None or self.scale is None else self.scale.decode(found.scale)
        return Scales(block, found.tensor_scale, self, dim)

    def nearest_scales(self, block: Tensor | None, tensor: Tensor | None = None, dim: int = -1) -> Scales:
        """Return the scales that the format can store nearest to numbers of your own, in the shapes of ``Scales``.

        Raises: FormatError for parts that the format does not have.
        """
        return Scales(
            None if block is None else given.nearest_block(block, self),
            None if tensor is None else given.nearest_tensor(tensor),
            self,
            dim,
        )

    def round_under(self, x: Tensor, scales: Scales, at: tuple[int, int] = (0, 0)) -> Tensor:
        """Return ``x`` rounded to values of this format under ``scales``, in its own shape and dtype.

        ``round_under(x, scales(x))`` is ``fake_quantize(x)``. Rows and columns are counted with the dimension of the
        scales as columns; ``x`` may be some of them, which begin ``at`` a row and a column of what the scales are of
        (rows only of a matrix): ``round_under(w[:, 5:6], scales, at=(0, 5))`` is the sixth column.

        Raises: as ``fake_quantize``; FormatError for scales of another format, ShapeError for those of another shape,
        and for columns that end within a run of values that are rotated together.
        """
        rows = self._part(x, scales, at)
        values = given.fake_quantize(rows, scales, self, at)
        if self.rotation is not None:
            values = arithmetic.narrowed(self.rotation.back(values), x.dtype)
        return _shaped(values, x, scales.dim)

    def codes_under(self, x: Tensor, scales: Scales, at: tuple[int, int] = (0, 0)) -> Tensor:
        """Return the codes (uint8, one a value, the shape of ``x``) of what ``round_under`` returns. Raises: as it."""
        return _shaped(given.codes(self._part(x, scales, at), scales, self, at), x, scales.dim)

    def quantized(self, codes: Tensor, scales: Scales, dtype: torch.dtype) -> "Quantized":
        """Return the tensor of ``codes`` (uint8, one a value) under ``scales``, whose values are to be in ``dtype``.

        ``quantized(codes_under(x, scales(x)), scales(x), x.dtype)`` is ``quantize(x)``.
        """
        dim = scales.dim
        data = pack(codes.movedim(dim, -1), self.element.bits).movedim(-1, dim)
        scale = None if scales.block is None or self.scale is None else self.scale.encode(scales.block)
        return Quantized(data, scale, scales.tensor, self, dtype, codes.shape[dim], dim)

    def _part(self, x: Tensor, scales: Scales, at: tuple[int, int]) -> Tensor:
        """Return ``x`` as rows, rotated."""
        if self.rotation is not None and at[1] % self.rotation.size:
            raise ShapeError(
                f"column {at[1]} is within a run of {self.rotation.size} values that format '{self.name}' rotates "
                "together; rotate the whole, and ask its without_rotation"
            )
        return rotated(_rows(x, scales.dim), self.rotation)

    def _check_number(self) -> None:
        if self.tensor_scale == "static" and self.static_scale is None:
            raise FormatError(
                f"format '{self.name}' has a static tensor scale and no number for it: calibrate the model "
                "(qsurgeon.calibrate), or set static_scale"
            )


@dataclass(frozen=True, eq=False)
class Quantized:
    """The codes and scales of a tensor.

    data: uint8, the codes packed along ``dim``, see ``formats.packing``. scale: a code a block, blocks along
    ``dim``; None without blocks. tensor_scale: float32, () or one a row, or None. dtype: what ``dequantize``
    returns. length: of ``dim`` before it was packed.
    """

    data: Tensor
    scale: Tensor | None
    tensor_scale: Tensor | None
    format: Format
    dtype: torch.dtype
    length: int
    dim: int = -1

    @cached_property
    def codes(self) -> Tensor:
        """The codes, uint8, one a value, in the shape of the tensor that was quantized."""
        return unpack(self.data.movedim(self.dim, -1), self.format.element.bits, self.length).movedim(-1, self.dim)

    @property
    def is_finite(self) -> bool:
        """Whether no code and no scale stands for NaN or infinity."""
        parts = [] if self.tensor_scale is None else [self.tensor_scale]
        if self.scale is not None and self.format.scale is not None:
            parts.append(self.format.scale.decode(self.scale))
        if not all(math.isfinite(value) for value in self.format.element.values):
            parts.append(self.format.element.decode(self.codes))
        return all(bool(one.isfinite().all()) for one in parts)

    def dequantize(self) -> Tensor:
        """Return the values, in the shape and dtype of the tensor that was quantized.

        Raises: ShapeError for data and scales that are not this format's for ``length`` codes.
        """
        data = self.data.movedim(self.dim, -1)
        scale = None if self.scale is None else _at_least_rows(self.scale.movedim(self.dim, -1))
        self._check(_at_least_rows(data), scale)
        above = None if self.tensor_scale is None else above_of(self.tensor_scale, data.shape[:-1])
        rotation = self.format.rotation
        dtype = self.dtype if rotation is None else torch.float32
        rows = _at_least_rows(data)
        values = kernels.dequantize(rows, scale, above, self.format, self.length, dtype)
        if rotation is not None:
            values = arithmetic.narrowed(rotation.back(values), self.dtype)
        return (values if data.dim() > 1 else values.squeeze(0)).movedim(-1, self.dim)

    def _check(self, data: Tensor, scale: Tensor | None) -> None:
        """Refuse bytes of another shape, dtype or place: a kernel reads what it is told to."""
        format = self.format
        parts = {"codes": data, "scale": scale, "tensor_scale": self.tensor_scale}
        places = {name: str(tensor.device) for name, tensor in parts.items() if tensor is not None}
        if len(set(places.values())) > 1:
            raise ShapeError(
                f"the parts of a quantized tensor lie on different devices, {places}: one was not loaded, or not moved"
            )
        expected = packed_length(self.length, format.element.bits)
        if data.dtype != torch.uint8:
            raise ShapeError(f"data of {data.dtype} cannot be packed codes; expected torch.uint8")
        if data.shape[-1] != expected:
            raise ShapeError(f"{data.shape[-1]} bytes a row cannot be {self.length} codes; expected {expected}")
        height, width = format.block_shape
        wanted = (
            None
            if format.scale is None
            else (format.scale.dtype, (-(-data.shape[-2] // height), -(-self.length // width)))
        )
        found = None if scale is None else (scale.dtype, tuple(scale.shape[-2:]))
        lead = data.shape[:-2] if scale is None else scale.shape[:-2]
        if found != wanted or lead != data.shape[:-2]:
            raise ShapeError(f"scale is {found}, which is not that of format '{format.name}' here; expected {wanted}")
        above = self.tensor_scale
        if (above is None) != (format.tensor_scale == "none"):
            raise ShapeError(f"tensor_scale is {above}, which format '{format.name}' does not go with")
        if above is not None and (above.dtype != torch.float32 or above.numel() not in (1, math.prod(data.shape[:-1]))):
            raise ShapeError(
                f"tensor_scale of {above.dtype} with {above.numel()} values; expected torch.float32, one or one a row"
            )


def _rows(x: Tensor, dim: int) -> Tensor:
    """Return ``x`` as (…, rows, columns), the contraction dimension last, refusing what cannot be quantized."""
    if not x.is_floating_point() or x.element_size() == 1:
        raise ShapeError(f"cannot quantize a tensor of {x.dtype}; expected float32, bfloat16, float16 or float64")
    # Dynamo of torch 2.13 does not trace the question in a backward pass.
    if not torch.compiler.is_compiling() and x.layout != torch.strided:
        raise ShapeError(
            f"cannot quantize a tensor of layout {x.layout}; expected torch.strided: call to_dense() first"
        )
    if x.dim() == 0:
        raise ShapeError("cannot quantize a tensor without dimensions; blocks run along one")
    if (torch.is_grad_enabled() and x.requires_grad) or has_tangent(x):
        raise GradientError(
            "fake quantization has no gradient of its own: use QuantLinear (or layers.straight_through), "
            "or call it under torch.no_grad()"
        )
    return _at_least_rows(x.movedim(dim, -1))


def _at_least_rows(x: Tensor) -> Tensor:
    return x if x.dim() > 1 else x.unsqueeze(0)


def _shaped(rows: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return ``rows`` in the order of dimensions, and with the number of them, that ``x`` has."""
    return (rows if x.dim() > 1 else rows.squeeze(0)).movedim(-1, dim)
