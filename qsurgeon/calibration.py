"""Static tensor scales: one number per module, found by running the model on examples and kept in its record."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qsurgeon.errors import CalibrationError
from qsurgeon.exchange.fused import groups as joined
from qsurgeon.formats import Format
from qsurgeon.formats.fields import SMALLEST_TENSOR_SCALE
from qsurgeon.hf.quantizer import hosts, note
from qsurgeon.layers import PackedLayer, Quantization, QuantLayer, QuantProduct, quant_layers
from qsurgeon.layers.kinds import kind_in
from qsurgeon.observing import Seen, observed, undisturbed
from qsurgeon.surgery import plain_model

Model = TypeVar("Model", bound=nn.Module)


def calibrate(model: Model, batches: Iterable[Mapping[str, Any]]) -> Model:
    """Give every static tensor scale of a wrapped model its number, and return the model.

    The number lets the largest magnitude that a module's input took in ``batches`` (each is what the model is called
    with: ``{"input_ids": …}``), or that its weight has, be the format's largest. It is found with scales of each
    tensor's own, stands in the model's record from then on, and is saved with it. Several processes, each with
    batches of its own, agree on the largest.

    Raises: CalibrationError if nothing is static, if no batch reaches a module, or if one gives it a value that is
    not finite; the model is as it was then.
    """
    layers = {path: layer for path, layer in quant_layers(model).items() if any(_roles(layer).values())}
    if not layers:
        raise CalibrationError("no module has a static tensor scale; say tensor_scale: static in a recipe's formats")
    largest: dict[str, Tensor] = {}
    before = {path: layer.quantizations for path, layer in layers.items()}

    def see(call: Seen[QuantLayer]) -> None:
        for weight, how in before[call.name].items():
            if call.input.numel():
                name, top = kind_in(call.layer).entry(call.name, weight), _amax(call.input, how.input)
                largest[name] = torch.maximum(largest.get(name, top), top)

    with _dynamically(layers), observed(layers, see), undisturbed(model):
        for batch in batches:
            model(**batch)
    _agree(largest)
    chosen = {path: _calibrated(path, layer, largest) for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.quantize_as(chosen[path])
    for host in hosts(plain_model(model)[1]):
        note(host)
    return model


def share_scales(model: Model) -> Model:
    """Let the weights that engines join (q, k and v; gate and up) have one tensor scale, and return the model.

    vLLM and SGLang take the largest of theirs for all of them, and so compute with other weights than were trained. The
    scale of a group is the largest that its weights have now; it stands in the record, as a static one does, and stays:
    so share the scales when a recipe was applied, and train with them. A weight that outgrows its scale saturates.

    Raises: CalibrationError if no two weights that are joined have tensor scales, or if one of them is packed.
    """
    layers = quant_layers(model)
    scaled = {path: layer for path, layer in layers.items() if isinstance(layer, QuantProduct) and _has_scale(layer)}
    groups = joined(scaled)
    if not groups:
        raise CalibrationError("no modules that engines join have weights with a tensor scale: there is none to share")
    if packed := next((path for names in groups for path in names if isinstance(layers[path], PackedLayer)), None):
        raise CalibrationError(
            f"the weight of {packed} is packed under its own scale: share the scales of the master model, then pack it"
        )
    for names in groups:
        tops = [_tensor_scale(scaled[path]) for path in names]
        for path in names:
            how = scaled[path].quantization
            assert how.weight is not None
            shared = replace(how.weight, tensor_scale="static", static_scale=max(tops))
            chosen = Quantization(shared, how.input, how.behavior, how.rule)
            scaled[path].quantize_as(dict.fromkeys(scaled[path].quantizations, chosen))
    for host in hosts(plain_model(model)[1]):
        note(host)
    return model


def _has_scale(layer: QuantProduct) -> bool:
    """Return whether a layer's weight has one tensor scale above those of its blocks."""
    weight = layer.quantization.weight
    return weight is not None and weight.block is not None and weight.as_weight.tensor_scale in ("tensor", "static")


def _tensor_scale(layer: QuantProduct) -> float:
    weight = layer.quantization.weight
    assert weight is not None
    if weight.static_scale is not None:
        return weight.static_scale
    dynamic = replace(weight, tensor_scale="tensor").as_weight
    found = dynamic.scales(layer.weights[0].rows(layer.weight.detach())).tensor
    assert found is not None
    return max(float(found), SMALLEST_TENSOR_SCALE)


def _roles(layer: QuantLayer) -> dict[str, list[str]]:
    """Return which operands of each weight have a static scale to be found; that of a packed weight is part of it."""
    found = {}
    for weight, how in layer.quantizations.items():
        formats = {"input": how.input} if isinstance(layer, PackedLayer) else {"weight": how.weight, "input": how.input}
        found[weight] = [role for role, one in formats.items() if one is not None and one.tensor_scale == "static"]
    return found


@contextmanager
def _dynamically(layers: Mapping[str, QuantLayer]) -> Iterator[None]:
    """Let ``layers`` compute inside the block with scales of each tensor's own."""
    before = {path: layer.quantizations for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            packed = isinstance(layer, PackedLayer)
            layer.quantize_as({weight: _dynamic_of(how, packed=packed) for weight, how in before[path].items()})
        yield
    finally:
        for path, layer in layers.items():
            layer.quantize_as(before[path])


def _dynamic_of(how: Quantization, *, packed: bool) -> Quantization:
    return replace(how, weight=how.weight if packed else _dynamic(how.weight), input=_dynamic(how.input))


def _amax(x: Tensor, format: Format | None) -> Tensor:
    """Return the largest magnitude of what ``format`` rounds: of ``x``, rotated if it rotates."""
    rotation = None if format is None else format.rotation
    low, high = torch.aminmax(x if rotation is None else rotation(x))
    return torch.maximum(high, -low).to(torch.float32)


def _dynamic(format: Format | None) -> Format | None:
    if format is None or format.tensor_scale != "static":
        return format
    return replace(format, tensor_scale="tensor", static_scale=None)


def _agree(largest: dict[str, Tensor]) -> None:
    """Give all processes the largest of each module, those that only some of them reached too."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    of_all: list[dict[str, float]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(of_all, {path: top.item() for path, top in largest.items()})
    for path in {path for one in of_all for path in one}:
        largest[path] = torch.tensor([one.get(path, 0.0) for one in of_all]).amax()  # NaN, if any has it


def _calibrated(path: str, layer: QuantLayer, largest: Mapping[str, Tensor]) -> dict[str, Quantization]:
    """Return how each weight of a layer computes, with the numbers of its static scales."""
    hows = dict(layer.quantizations)
    declared = {weight.name: weight for weight in layer.weights}
    for weight, roles in _roles(layer).items():
        name = kind_in(layer).entry(path, weight)
        for role in roles:
            if role == "weight":
                top = _amax(declared[weight].rows(getattr(layer, weight)), hows[weight].weight)
            elif not declared[weight].takes_input:
                raise CalibrationError(f"what {name} is multiplied with is made inside of its module, and not seen")
            elif name not in largest:
                raise CalibrationError(f"no batch reached {name}: its input's static scale has no number")
            else:
                top = largest[name]
            hows[weight] = _numbered(hows[weight], role, top.item(), name)
    return hows


def _numbered(how: Quantization, role: str, top: float, name: str) -> Quantization:
    """Return ``how`` with the static scale that lets ``top`` be the largest of the format of an operand."""
    if not top < float("inf"):
        raise CalibrationError(f"the {role} of {name} has values that are not finite")
    format: Format = getattr(how, role)
    number = torch.tensor(max(top / format.top, SMALLEST_TENSOR_SCALE)).item()
    numbered = replace(format, static_scale=number)
    return replace(how, weight=numbered) if role == "weight" else replace(how, input=numbered)
