"""The product of a layer whose weight is split over processes (tensor parallelism): a DTensor.

Each process multiplies its parts, and the numbers are those of one process: what the parts of an operand share, the
largest magnitude behind a tensor scale, the processes agree on. What would be rounded otherwise in parts than in the
whole (a block or a rotation that the split cuts in two, a random number that depends on the place) is an error.

Split along the outputs, each process has some of the outputs. Split along the inputs (the contraction), each has a
term of the sum, which DTensor adds up when it is asked for: in another order than one process, as with nn.Linear.
"""

from collections.abc import Callable, Sequence
from math import lcm
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qsurgeon.errors import ShapeError, SurgeryError
from qsurgeon.formats import Format
from qsurgeon.formats.packing import packed_length
from qsurgeon.layers.added import Added
from qsurgeon.layers.product import packed_linear, quantized_linear
from qsurgeon.layers.quantization import Quantization
from qsurgeon.layers.rounding import Agree, Agreement
from qsurgeon.storage.packed import SCALE, TENSOR_SCALE, WEIGHT

Placements = tuple[Any, ...]  # one for each dimension of the mesh
OUTPUTS, INPUTS = 0, 1  # the dimensions of a weight


class Layer(NamedTuple):
    """What is said of the layer itself. name: for errors."""

    name: str
    inputs: int
    outputs: int
    how: Quantization
    is_packed: bool = False


def is_sharded(tensor: Tensor | None) -> bool:
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")


def on_mesh(x: Tensor, weight: Any) -> Tensor:
    """Return ``x`` as a DTensor where ``weight`` is one: a plain tensor is the same in all processes."""
    if not is_sharded(weight) or is_sharded(x):
        return x
    tensors: Any = torch.distributed.tensor
    whole = [tensors.Replicate()] * weight.device_mesh.ndim
    made: Tensor = tensors.DTensor.from_local(x, weight.device_mesh, whole, run_check=False)
    return made


def sharded_linear(x: Tensor, weight: Any, bias: Any, layer: Layer) -> Tensor:
    """Return q(x) · q(W)ᵀ + b as a DTensor; each process has computed its part of it.

    Raises: ShapeError for a split in which a part would be rounded otherwise than in the whole; as
    ``quantized_linear``.
    """
    split = _Split.of(on_mesh(x, weight), weight, layer)
    local_x, local_weight = split.local(split.x, split.input, split.input_gradient), split.weight_of(weight)
    product = quantized_linear(local_x, local_weight, split.bias_of(bias), layer.how, split.agreement(layer))
    return split.whole(product, layer.outputs)


def sharded_packed_linear(x: Tensor, stored: dict[str, Any], bias: Any, layer: Layer) -> Tensor:
    """Return the same for a weight that is its codes and scales, by the names of ``formats.stored``.

    Raises: as ``sharded_linear`` and ``packed_linear``.
    """
    split = _Split.of(on_mesh(x, stored[WEIGHT]), stored[WEIGHT], layer)
    local_x = split.local(split.x, split.input, split.input_gradient)
    parts = [split.part(name, tensor, layer) for name, tensor in stored.items()]
    grid = layer.how.weight_grid
    if grid is not None and parts[0].shape[-1] != packed_length(local_x.shape[-1], grid.element.bits):
        raise ShapeError(_cut(layer, "codes", local_x.shape[-1], "bytes of its weight do"))
    product = packed_linear(local_x, parts, split.bias_of(bias), layer.how, split.agreement(layer))
    return split.whole(product, layer.outputs)


def refuse_part(layer: Layer, weight: Tensor) -> None:
    """Do nothing if ``weight``, a plain tensor smaller than the layer's, is rounded as it is in the whole.

    So are some of its rows where nothing in them depends on others. Raises: ShapeError.
    """
    grid = layer.how.weight_grid
    depends = grid is not None and (
        grid.is_two_dimensional
        or grid.rounding == "stochastic"
        or (grid.tensor_scale == "tensor" and not grid.has_row_scales)
    )
    if depends or weight.shape[1] < layer.inputs:
        raise ShapeError(
            f"{layer.name} has {layer.outputs} outputs and {layer.inputs} inputs, and is called with a weight of "
            f"{tuple(weight.shape)}, a part that would be rounded otherwise than in the whole. Split it as a "
            "DTensor, exclude it, or set out_features and in_features if this is the whole"
        )


def refuse_added(layer: Layer, added: Added | None) -> None:
    """Do nothing if nothing is added to a weight that is split among processes. Raises: SurgeryError."""
    if added is not None:
        raise SurgeryError(
            f"the weight of {layer.name} is split by tensor parallelism, and adapters: merged would add to it before "
            "it is rounded; use adapters: apart, or do not split it"
        )


# ---- how it is split


class _Split(NamedTuple):
    """How the operands of one product are placed, and their gradients; one placement for each dimension of the mesh."""

    x: Any
    mesh: Any
    weight: Placements
    input: Placements
    bias: Placements
    output: Placements
    input_gradient: Placements
    weight_gradient: Placements
    bias_gradient: Placements

    @classmethod
    def of(cls, x: Any, weight: Any, layer: Layer) -> "_Split":
        """Return how ``x`` is multiplied with ``weight``. Raises: ShapeError for a split that is not known."""
        found = [
            _placed(one, there, x.dim(), layer) for one, there in zip(weight.placements, x.placements, strict=True)
        ]
        columns = zip(*found, strict=True)
        split = cls(x, weight.device_mesh, weight.placements, *(tuple(column) for column in columns))
        split.check(layer)
        return split

    def local(self, tensor: Any, placements: Placements, gradient: Placements) -> Any:
        """Return this process' part of ``tensor``, which is placed so first; its gradient will be placed so."""
        if tensor is None:
            return None
        tensor = on_mesh(tensor, self.x)
        if tensor.placements != placements:
            tensor = tensor.redistribute(placements=placements)
        return tensor.to_local(grad_placements=gradient)

    def weight_of(self, weight: Any) -> Tensor:
        """Return this process' part of the weight."""
        part: Tensor = self.local(weight, self.weight, self.weight_gradient)
        return part

    def bias_of(self, bias: Any) -> Tensor | None:
        """Return this process' part of the bias, which one term of a sum has, and the others not."""
        part: Tensor | None = self.local(bias, self.bias, self.bias_gradient)
        terms = [i for i, one in enumerate(self.output) if one.is_partial()]
        if part is None or all(self.mesh.get_local_rank(i) == 0 for i in terms):
            return part
        nothing: Tensor = _Nothing.apply(part)  # type: ignore[no-untyped-call]
        return nothing

    def part(self, name: str, tensor: Any, layer: Layer) -> Tensor:
        """Return this process' part of a tensor of a packed weight: that which goes with its part of the codes."""
        tensors: Any = torch.distributed.tensor
        grid = layer.how.weight_grid
        by_row = name != TENSOR_SCALE or (grid is not None and grid.has_row_scales)
        kept = {OUTPUTS: by_row, INPUTS: name in (WEIGHT, SCALE)}
        placed = tuple(
            one if one.is_replicate() or kept[_dimension(one)] else tensors.Replicate() for one in self.weight
        )
        part: Tensor = self.local(tensor, placed, placed)
        return part

    def whole(self, product: Tensor, outputs: int) -> Tensor:
        """Return the DTensor of which ``product`` is this process' part."""
        shape = torch.Size((*self.x.shape[:-1], outputs))
        stride = torch.empty(shape, device="meta").stride()
        make: Callable[..., Tensor] = torch.distributed.tensor.DTensor.from_local
        return make(product, self.mesh, self.output, run_check=False, shape=shape, stride=stride)

    def check(self, layer: Layer) -> None:
        """Do nothing if each part is rounded as in the whole. Raises: ShapeError."""
        how, last = layer.how, self.x.dim() - 1
        turned = 1 if how.rotation is None else how.rotation.size
        for role, grid, placements in (("input", how.input_grid, self.input), ("weight", how.weight_grid, self.weight)):
            across = INPUTS if role == "weight" else last
            height, width = (1, 1) if grid is None else (grid.block_shape[0], grid.block_shape[1] or 1)
            _check_parts(layer, self._sizes(placements, across, layer.inputs), lcm(width, turned), f"{role}'s blocks")
            if role == "weight":
                _check_parts(layer, self._sizes(placements, OUTPUTS, layer.outputs), height, "weight's blocks")
            is_split = any(not one.is_replicate() and self.mesh.size(i) > 1 for i, one in enumerate(placements))
            is_drawn = grid is not None and grid.rounding == "stochastic" and not (role == "weight" and layer.is_packed)
            if grid is not None and is_drawn and is_split:
                raise ShapeError(
                    f"the {role} of {layer.name} is split over processes, and format '{grid.name}' rounds at random, "
                    "by the place of each value: a part would be rounded otherwise than in the whole. Exclude it, or "
                    "use rounding: nearest"
                )

    def _sizes(self, placements: Placements, dimension: int, size: int) -> list[int]:
        """Return the sizes of the parts that a dimension of ``size`` is cut into, of each cut."""
        sizes = []
        for i, one in enumerate(placements):
            if not one.is_replicate() and _dimension(one) == dimension and self.mesh.size(i) > 1:
                part = -(-size // self.mesh.size(i))
                sizes += [part] if part < size else []
                size = part
        return sizes

    def agreement(self, layer: Layer) -> Agreement | None:
        """Return how the processes agree on the largest magnitudes of each operand, if one is in parts that share."""
        rows, columns = layer.how.input_grid, layer.how.weight_grid
        agree = Agreement(self._agree(rows, self.input, self.x.dim() - 1), self._agree(columns, self.weight, INPUTS))
        return None if agree == Agreement(None, None) else agree

    def _agree(self, grid: Format | None, placements: Placements, last: int) -> Agree | None:
        """Return how parts of an operand agree, whose tensor scales are of each row or of all."""
        if grid is None or grid.tensor_scale == "none":
            return None
        places = [
            i
            for i, one in enumerate(placements)
            if not one.is_replicate() and (_dimension(one) == last or not grid.has_row_scales)
        ]
        return (lambda top: _largest_of_all(top, self.mesh, places)) if places else None


def _placed(weight: Any, x: Any, dimensions: int, layer: Layer) -> tuple[Any, ...]:
    """Return, of one dimension of the mesh, the placements that ``_Split`` has beside the weight's."""
    tensors: Any = torch.distributed.tensor
    whole, term, last = tensors.Replicate(), tensors.Partial(), dimensions - 1
    if weight.is_replicate():
        rows = x if type(x) is tensors.Shard and x.dim % dimensions != last else whole
        gradient = whole if rows.is_replicate() else term
        return rows, whole, rows, rows, gradient, gradient
    if type(weight) is tensors.Shard and weight.dim % 2 == OUTPUTS:
        return whole, tensors.Shard(0), tensors.Shard(last), term, weight, tensors.Shard(0)
    if type(weight) is tensors.Shard:
        return tensors.Shard(last), whole, term, tensors.Shard(last), weight, whole
    raise ShapeError(
        f"the weight of {layer.name} is split as {weight}; a wrapped layer can be split by whole runs of rows or of "
        "columns (Shard(0), Shard(1)). Exclude it"
    )


class _Nothing(torch.autograd.Function):
    """Zeros, whose gradient is that of what they stand for."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor) -> Tensor:
        return torch.zeros_like(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def _dimension(placement: Any) -> int:
    dimension: int = placement.dim
    return dimension


def _check_parts(layer: Layer, sizes: Sequence[int], unit: int, what: str) -> None:
    for size in sizes:
        if size % unit:
            raise ShapeError(_cut(layer, what, size, f"runs of {unit} values do"))


def _cut(layer: Layer, what: str, size: int, fits: str) -> str:
    return (
        f"{layer.name} is split over processes into parts of {size} values, which cut its {what} ({fits} not fit): a "
        "part would be rounded otherwise than in the whole. Exclude it, split it along its outputs (colwise), or over "
        "fewer processes"
    )


def _largest_of_all(top: Tensor, mesh: Any, places: Sequence[int]) -> Tensor:
    """Return the largest of ``top`` (float32) over the processes along some dimensions of the mesh; NaN if one is."""
    tensors: Any = torch.distributed.tensor
    placements = [tensors.Partial("max") if i in places else tensors.Replicate() for i in range(mesh.ndim)]
    # A maximum over processes may lose NaN: it is counted beside.
    both = torch.stack((top.nan_to_num(nan=torch.inf, posinf=torch.inf), top.isnan().to(top.dtype)))
    largest, is_nan = tensors.DTensor.from_local(both, mesh, placements, run_check=False).full_tensor()
    result: Tensor = torch.where(is_nan > 0, torch.nan, largest)
    return result
