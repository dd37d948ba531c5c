"""Static tensor scales: one number a module, found by running the model on examples, kept in its record."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qsurgeon.errors import CalibrationError
from qsurgeon.formats import Format
from qsurgeon.formats.fields import SMALLEST_TENSOR_SCALE
from qsurgeon.hf.quantizer import hosts, note
from qsurgeon.layers import PackedLinear, Quantization, QuantLinear, quant_linears
from qsurgeon.layers.compiling import eagerly
from qsurgeon.surgery import plain_model


def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> nn.Module:
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
    with _observed(layers) as largest, _evaluating(model), eagerly(model), torch.no_grad():
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
def _observed(layers: Mapping[str, QuantLinear]) -> Iterator[dict[str, Tensor]]:
    """Let ``layers`` compute with scales of each tensor's own; yield the largest magnitude of each one's input."""
    before = {path: layer.quantization for path, layer in layers.items()}
    largest: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        def see(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else kwargs["input"]
            if x.numel():
                top = _amax(x, before[path].input)
                largest[path] = torch.maximum(largest.get(path, top), top)

        return see

    hooks = [layer.register_forward_pre_hook(watch(path), with_kwargs=True) for path, layer in layers.items()]
    try:
        for path, layer in layers.items():
            how = before[path]
            weight = how.weight if isinstance(layer, PackedLinear) else _dynamic(how.weight)
            vars(layer)["quantization"] = replace(how, weight=weight, input=_dynamic(how.input))
        yield largest
    finally:
        for hook in hooks:
            hook.remove()
        for path, layer in layers.items():
            vars(layer)["quantization"] = before[path]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch off what only training does (dropout, running statistics); every module's mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _amax(x: Tensor, format: Format | None) -> Tensor:
    """Return the largest magnitude of what ``format`` rounds: of ``x``, rotated if it rotates."""
    rotation = None if format is None else format.rotation
    x = x.detach()
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
