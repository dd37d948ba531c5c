"""Static tensor scales: one number per module, found by running the model on examples and kept in its record."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qsurgeon.errors import CalibrationError
from qsurgeon.formats import Format
from qsurgeon.formats.fields import SMALLEST_TENSOR_SCALE
from qsurgeon.hf.quantizer import hosts, note
from qsurgeon.layers import PackedLinear, Quantization, QuantLinear, quant_linears
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
    layers = {path: layer for path, layer in quant_linears(model).items() if _roles(layer)}
    if not layers:
        raise CalibrationError("no module has a static tensor scale; say tensor_scale: static in a recipe's formats")
    largest: dict[str, Tensor] = {}
    formats = {path: layer.quantization.input for path, layer in layers.items()}

    def see(call: Seen[QuantLinear]) -> None:
        if call.input.numel():
            top = _amax(call.input, formats[call.name])
            largest[call.name] = torch.maximum(largest.get(call.name, top), top)

    with _dynamically(layers), observed(layers, see), undisturbed(model):
        for batch in batches:
            model(**batch)
    _agree(largest)
    chosen = {path: _calibrated(path, layer, largest) for path, layer in layers.items()}
    for path, layer in layers.items():
        vars(layer)["quantization"] = chosen[path]
    for host in hosts(plain_model(model)[1]):
        note(host)
    return model


def _roles(layer: QuantLinear) -> list[str]:
    """Return which of a module's operands have a static scale to be found; that of a packed weight is part of it."""
    how = layer.quantization
    formats = {"input": how.input} if isinstance(layer, PackedLinear) else {"weight": how.weight, "input": how.input}
    return [role for role, format in formats.items() if format is not None and format.tensor_scale == "static"]


@contextmanager
def _dynamically(layers: Mapping[str, QuantLinear]) -> Iterator[None]:
    """Let ``layers`` compute inside the block with scales of each tensor's own."""
    before = {path: layer.quantization for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            how = before[path]
            weight = how.weight if isinstance(layer, PackedLinear) else _dynamic(how.weight)
            vars(layer)["quantization"] = replace(how, weight=weight, input=_dynamic(how.input))
        yield
    finally:
        for path, layer in layers.items():
            vars(layer)["quantization"] = before[path]


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


def _calibrated(path: str, layer: QuantLinear, largest: Mapping[str, Tensor]) -> Quantization:
    how = layer.quantization
    for role in _roles(layer):
        format: Format = getattr(how, role)
        if role == "input" and path not in largest:
            raise CalibrationError(f"no batch reached {path}: its input's static scale has no number")
        top = (_amax(layer.weight, format) if role == "weight" else largest[path]).item()
        if not top < float("inf"):
            raise CalibrationError(f"the {role} of {path} has values that are not finite")
        number = torch.tensor(max(top / format.top, SMALLEST_TENSOR_SCALE)).item()
        numbered = replace(format, static_scale=number)
        how = replace(how, weight=numbered) if role == "weight" else replace(how, input=numbered)
    return how
