"""PackedLayer: a wrapped layer that holds its weight as codes and scales alone."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn

from qsurgeon.errors import CheckpointError, CodesError, FormatError, NothingWrappedError, ShapeError, SurgeryError
from qsurgeon.formats import Format, Quantized
from qsurgeon.formats.rotation import rotated
from qsurgeon.layers.added import Added
from qsurgeon.layers.codes import Codes, plain
from qsurgeon.layers.dequantized import packed_format
from qsurgeon.layers.export import refuse_export
from qsurgeon.layers.layer import QuantProduct, quant_layers
from qsurgeon.layers.linear import QuantLinear
from qsurgeon.layers.noise import noisy_norms
from qsurgeon.layers.phases import During, without
from qsurgeon.layers.product import packed_linear
from qsurgeon.layers.quantization import Quantization
from qsurgeon.layers.sharded import is_sharded, sharded_packed_linear
from qsurgeon.storage import PACKED, Encoding
from qsurgeon.storage.packed import SCALE, TENSOR_SCALE, WEIGHT, from_stored, stored_shapes, to_stored
from qsurgeon.torch_private import own_parameters, without_subclass
from qsurgeon.transformers_private.attributes import READ
from qsurgeon.words import Behavior


class PackedLayer(QuantProduct):
    """A QuantProduct whose ``weight`` is uint8: the codes, beside ``weight_scale`` and ``weight_tensor_scale``.

    The codes are of the weight as (outputs, inputs), whatever the layout of the parameter was. Their own layout is that
    of ``storage.packed``. With a format that rotates, they are of the rotated weight, W·R, which is what the rotated
    input is multiplied with. The layer computes what it did with the weight that was packed, to the bit. The weight is
    dequantized in each forward and each backward pass, in the dtype that the input has, and has no gradient. The input
    and the bias have theirs.

    Its tensors are ``Codes``, with which nothing can compute by mistake; what is put in their place becomes Codes too.

    compute_dtype: what the weight was before it was packed, which follows ``.to(dtype)``. peft makes its adapters'
    parameters in it, and other code that asks the weight for its dtype is told it.
    """

    compute_dtype: torch.dtype
    encoding: Encoding = PACKED  # how the tensors are stored

    @classmethod
    def check_packing(cls, linear: nn.Module, quantization: Quantization) -> None:
        """Do nothing if ``linear`` can be packed.

        Raises: SurgeryError as ``check``, for a weight that is no parameter (old-style weight_norm,
        spectral_norm, prune), of a dtype that cannot be rounded, or whose values are elsewhere (offloaded, sharded),
        and for a rule that does not round it in every phase; FormatError for a static scale without a number;
        ShapeError for a weight that its format or rotation does not fit.
        """
        cls.check(linear)
        weight, grid = own_parameters(linear).get(WEIGHT), packed_format(quantization)
        if weight is None:
            raise SurgeryError(
                "its weight is not a parameter: a hook computes it before each call (weight_norm, spectral_norm or "
                "prune of torch.nn.utils). Make it permanent with remove_weight_norm, remove_spectral_norm or "
                "prune.remove, and pack it then"
            )
        if grid.tensor_scale == "static" and grid.static_scale is None:
            raise FormatError(
                f"format '{grid.name}' has a static tensor scale and no number for it: a weight that is packed cannot "
                "wait for one"
            )
        if refused := refused_by_packing(quantization.behavior):
            raise SurgeryError(refused[1])
        if hasattr(weight, "device_mesh"):
            raise SurgeryError("its weight is sharded; pack the model before fully_shard")
        if weight.is_meta and getattr(linear, "_hf_hook", None) is not None:
            raise SurgeryError("its weight is offloaded, and its values are not here to be packed")
        # Of a weight without rows, to learn whether the dtype and the length of a row can be rounded.
        inputs = cls.weights[0].row_shape(weight.shape)[-1]
        pack(torch.empty(0, inputs, dtype=weight.dtype), quantization)

    @classmethod
    def check_all(cls, module: nn.Module, hows: Mapping[str, Quantization]) -> None:
        """Do nothing if ``module`` can be packed. Raises: as ``check_packing``."""
        cls.check_packing(module, hows[WEIGHT])

    @classmethod
    def wrap(cls, linear: nn.Module, quantization: Quantization, name: str = "") -> None:
        """Turn ``linear`` itself into a packed layer; of a weight on the meta device only the shapes are packed.

        ``name``: see the class. Raises: as ``check_packing``.
        """
        cls.check_packing(linear, quantization)
        weight = linear.get_parameter(WEIGHT)
        if weight.is_meta:
            packed = empty(packed_format(quantization), *cls.weights[0].row_shape(weight.shape))
        else:
            packed = pack(cls.weights[0].rows(weight), quantization)
        super().wrap(linear, quantization, name)
        vars(linear)["compute_dtype"] = weight.dtype
        vars(linear)[READ] = True  # transformers would draw new codes as if they were a weight
        for key, tensor in packed.items():
            linear.register_parameter(key, nn.Parameter(tensor, requires_grad=False))

    @property
    def grid(self) -> Format:
        """The format of the codes: the weight's, for values that are rotated already."""
        return packed_format(self.quantization)

    @property
    def stored(self) -> dict[str, nn.Parameter]:
        """The tensors that the weight is, by the names of ``formats.stored``."""
        return {name: getattr(self, name) for name in self.encoding.names(self.grid)}

    @torch.no_grad()
    def encode_as(self, encoding: Encoding) -> None:
        """Store the weight otherwise; on the meta device only the shapes are. Raises: FormatError for its format."""
        before = {name: plain(tensor) for name, tensor in self.stored.items()}
        slots = encoding.slots(self.grid, *self.features)
        if any(tensor.is_meta for tensor in before.values()):
            new = {name: torch.empty(slot.shape, dtype=slot.dtype, device="meta") for name, slot in slots.items()}
        else:
            new = encoding.encode(self._quantized(self.compute_dtype))
        for name in before:
            del own_parameters(self)[name]
        vars(self)["encoding"] = encoding
        for name, tensor in new.items():
            self.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=False))

    def _as_packed(self) -> dict[str, Tensor]:
        """Return the tensors of the weight as ``storage.packed`` has them. Raises: ShapeError for a sharded one."""
        if self.encoding is not PACKED and any(map(is_sharded, self.stored.values())):
            raise ShapeError(f"{self._label(WEIGHT)} is stored as {self.encoding.name}, which cannot be sharded")
        return to_stored(self._quantized(self.compute_dtype))

    def opened(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (outputs, inputs), rotated where its format rotates, as ``dtype`` or compute_dtype.

        Raises: ShapeError for tensors that are not this format's.
        """
        return self._quantized(dtype or self.compute_dtype).dequantize()

    def opened_rows(self, rows: Sequence[int]) -> Tensor:
        """Return some rows of what ``opened`` returns, in float32; they are whole bands of the format's blocks.

        Raises: as ``opened``.
        """
        height, kept = self.grid.block_shape[0], self.stored if self.encoding is PACKED else self._as_packed()
        bands = list(dict.fromkeys(row // height for row in rows))
        places = {WEIGHT: list(rows), SCALE: bands, TENSOR_SCALE: list(rows)}
        taken = {
            name: plain(tensor.detach()) if len(tensor) == 1 else plain(tensor.detach())[places[name]]
            for name, tensor in kept.items()
        }
        return from_stored(taken, self.grid, self.features[1], torch.float32).dequantize()

    def packed(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the tensors of ``weight``, a parameter in the layout that it had, packed; the layer stays as it is."""
        return pack(self.weights[0].rows(weight), self.quantization)

    def codes(self) -> Tensor:
        """Return the codes of the weight (outputs, inputs), uint8, one a value. Raises: as ``opened``."""
        return self._quantized(self.compute_dtype).codes

    @torch.no_grad()
    def repack(self, values: Tensor) -> None:
        """Take the codes of ``values`` (outputs, inputs), which are rotated already, in place of those that are here.

        Raises: ShapeError for values of another shape.
        """
        if values.shape != self.features:
            raise ShapeError(f"a weight is {self.features}, got {tuple(values.shape)}")
        for name, tensor in self.encoding.encode(self.grid.quantize(values)).items():
            self.get_parameter(name).copy_(tensor)

    def forward(self, input: Tensor, added: Added | None = None) -> Tensor:
        """Return q(x) · q(W)ᵀ + b.

        Raises: ShapeError for an input of another length or of whole numbers; CodesError for something to be added.
        """
        if added is not None:
            raise CodesError(f"the weight of {self._label(WEIGHT)} is codes, which an adapter cannot be added to")
        if input.shape[-1] != self.features[1]:
            raise ShapeError(f"the input has {input.shape[-1]} values a row; expected {self.features[1]}")
        refuse_export(self.training)
        stored: dict[str, Any] = self.stored if self.encoding is PACKED else self._as_packed()
        with without_subclass():  # of Codes
            if is_sharded(stored[WEIGHT]):
                return sharded_packed_linear(input, stored, self.bias, self._described()._replace(is_packed=True))
            return packed_linear(input, tuple(stored.values()), self.bias, self.quantization)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of the layer."""
        return f"{super().extra_repr()}, storage={self.encoding.name}"

    def _quantized(self, dtype: torch.dtype) -> Quantized:
        stored = {name: plain(tensor) for name, tensor in self.stored.items()}
        return self.encoding.decode(stored, self.grid, self.features[1], dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.compute_in(fn(torch.empty(1, dtype=self.compute_dtype)).dtype)
        return self

    def compute_in(self, dtype: torch.dtype) -> None:
        """Let ``dtype`` be what the weight's values are, as if it had been that before it was packed."""
        vars(self)["compute_dtype"] = dtype
        for tensor in self.stored.values():
            if isinstance(tensor, Codes):
                tensor.values_dtype = dtype

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a tensor of the weight, which becomes Codes, or the bias.

        Raises: CodesError for another, which would be in the place of the weight: torch's prune and its like make it.
        """
        if name != "bias" and name not in self.encoding.names(self.grid):
            raise CodesError(
                f"{self._label(WEIGHT)} holds packed codes, and a layer with packed codes takes no parameter '{name}'. "
                "Use storage: master for a weight that is pruned, normalized or parametrized"
            )
        super().register_parameter(name, self._as_codes(name, param))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; what is put in the place of a tensor of the weight becomes Codes. Raises: CodesError."""
        super().__setattr__(name, self._as_codes(name, value))

    def __delattr__(self, name: str) -> None:
        """Delete an attribute. Raises: CodesError for a tensor of the weight."""
        if name in self.encoding.names(self.grid):
            raise CodesError(
                f"{self._label(name)} holds packed codes, which nothing else can stand for. Use storage: master for a "
                "weight that is pruned, normalized or parametrized"
            )
        super().__delattr__(name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was pickled: Codes are pickled as ordinary tensors."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name in self.encoding.names(self.grid):
            own_parameters(self)[name] = self._as_codes(name, own_parameters(self)[name])

    def _label(self, name: str) -> str:
        return f"{self.name or type(self).__name__}.{name}"

    def _as_codes(self, name: str, value: Any) -> Any:
        """Return ``value`` as Codes of this layer, if it is a tensor in the place of one of the weight's."""
        if not isinstance(value, Tensor) or name not in self.encoding.names(self.grid):
            return value
        if type(value) in (Tensor, nn.Parameter):
            return Codes(value, value.requires_grad, self._label(name), values_dtype=self.compute_dtype)
        if isinstance(value, Codes):
            value.values_dtype = self.compute_dtype
        return value

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Refuse tensors that torch would cast: a value that is rounded to a byte is no code."""
        slots = self.encoding.slots(self.grid, *self.features)
        for name, slot in slots.items():
            found = state_dict.get(prefix + name)
            if found is not None and found.dtype != slot.dtype:
                raise CheckpointError(f"{prefix}{name} is {found.dtype}; a packed weight is {slot.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class PackedLinear(PackedLayer, QuantLinear):
    """A QuantLinear whose weight is packed."""


def refused_by_packing(behavior: Behavior) -> tuple[str, str] | None:
    """Return the field of ``behavior`` that a packed weight cannot obey, and why; None if it can obey all."""
    if behavior.phases != "both":
        return "phases", f"a packed weight is rounded in every phase, not in {behavior.phases} only"
    if behavior.backward != "dequantized":
        return "backward", "a packed weight has no values in high precision that a backward pass could multiply with"
    if behavior.adapters == "merged":
        return "adapters", "a packed weight is codes, which an adapter cannot be added to; keep storage: master"
    return None


def pack(weight: Tensor, quantization: Quantization) -> dict[str, Tensor]:
    """Return the tensors of ``weight`` (outputs, inputs) packed, by the names of ``formats.stored``.

    Raises: as ``Format.quantize``.
    """
    return to_stored(packed_format(quantization).quantize(rotated(weight.detach(), quantization.rotation)))


def empty(grid: Format, rows: int, columns: int) -> dict[str, Tensor]:
    """Return tensors on the meta device, of the shapes of a packed weight (rows, columns)."""
    shapes = stored_shapes(grid, rows, columns)
    return {name: torch.empty(shape, dtype=torch.uint8, device="meta") for name, shape in shapes.items()}


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Return the layers of ``model`` with packed weights, of all kinds, by their names in it."""
    return {name: module for name, module in quant_layers(model).items() if isinstance(module, PackedLayer)}


def uncounted(model: nn.Module) -> int:
    """Return how many values more than bytes, which ``numel`` counts, the packed weights of ``model`` have."""
    layers = packed_layers(model).values()
    return sum(prod(layer.features) - sum(one.numel() for one in layer.stored.values()) for layer in layers)


def kept_bytes(model: nn.Module) -> int:
    """Return how many bytes the rounded weights of ``model`` take that a generation keeps, if ``keep_at_most`` lets it.

    They are the weights that are rounded at each call: of a packed weight none are kept, and tied ones count once.
    """
    rounded: list[Tensor] = [
        getattr(layer, weight)
        for layer in quant_layers(model).values()
        for weight, how in layer.quantizations.items()
        if not isinstance(layer, PackedLayer) and how.weight
    ]
    weights = {id(one): one for one in rounded}
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


def disabled(*models: nn.Module) -> During:
    """Let ``models`` compute in full precision inside the block: a teacher or reference with the same weights.

    Norms have no noise there (``qsurgeon.noise``).
    As a phase does, it follows the work, into the threads that are started inside, tasks of asyncio and thread pools;
    what others do meanwhile with the same models is not disabled. Where ``backward`` is called makes no difference.

    Raises: NothingWrappedError for a model without a QuantLinear, which is in full precision everywhere. SurgeryError
    for one with packed weights, whose full precision is nowhere any more.
    """
    found = [quant_layers(model) for model in models]
    for model, layers in zip(models, found, strict=True):
        if not layers:
            raise NothingWrappedError(f"no module of {type(model).__name__} is wrapped: there is nothing to disable")
        if packed := packed_layers(model):
            raise SurgeryError(
                f"{len(packed)} weights of {type(model).__name__} are packed, such as that of {next(iter(packed))}: "
                "their full precision is gone. Load the checkpoint that they were packed from as a teacher or "
                "reference, or use storage: master"
            )
    noisy = [norm for model in models for norm in noisy_norms(model).values()]
    return without([*(layer for layers in found for layer in layers.values()), *noisy])
