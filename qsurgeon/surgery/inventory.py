"""The modules of a model, live or on the meta device, under the names of the plain model.

What torch.compile, DDP, FSDP1 and checkpoint_wrapper put around the model or any part, and peft's own modules do not
change a name: ``_orig_mod``, ``base_model.model.`` and ``.base_layer`` are stripped, and what peft adds is marked as an
adapter.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from qsurgeon.layers import PackedLinear, QuantLinear
from qsurgeon.surgery.parts import output_heads, towers
from qsurgeon.surgery.reader import Reader
from qsurgeon.torch_private import HOLDING, children


@dataclass(frozen=True)
class Tower:
    """A sub-model that reads no text, inside a model that reads something else besides: its name, class and input."""

    name: str
    kind: str
    reads: str


@dataclass(frozen=True)
class Module:
    """One module of a model.

    name: in the plain model, what patterns are matched with. path: in the model as it is. kind: its class.
    linear: whether it is ``nn.Linear`` itself (or a QuantLinear, which was one), not a subclass with a forward of
    its own. shape: of its weight, or of its largest own parameter.
    parameters: how many it owns (children not counted, a tied weight counted with its first owner only).
    bytes: what these take. A packed weight counts as the values that it stands for, in shape and parameters, and with
    the bytes that it takes. tied_to: the module that owns its weight, if that is another one.
    adapter: whether peft added it.
    shared: those of its parameters that another module owns. weight_bytes: what its weight takes, its own or shared.
    output_head: whether it computes the model's outputs, or lies in what does. tower: the sub-model it belongs to, if
    that reads no text (see ``parts``).
    readers: the code that takes its weight itself (see ``reads``), where that was asked for.
    """

    name: str
    path: str
    kind: str
    linear: bool
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    tied_to: str | None
    adapter: bool
    shared: tuple[str, ...] = ()
    weight_bytes: int = 0
    output_head: bool = False
    tower: Tower | None = None
    readers: tuple[Reader, ...] = ()


def inventory(model: nn.Module) -> tuple[Module, ...]:
    """Return every module of ``model`` but the root, in the model's order."""
    root_path, root = plain_model(model)
    owners: dict[int, str] = {}
    heads = {_joined(root_path, path) for path in output_heads(root)}
    reads = {_joined(root_path, path): what for path, what in towers(root).items()}
    inside: dict[str, Tower] = {}
    found = []
    for name, path, module, adapter in _walk(root, "", root_path, False):
        if not name:
            continue
        if path in reads:
            inside[path] = Tower(name, type(module).__name__, reads[path])
        tower = next((one for start, one in inside.items() if _is_within(path, start)), None)
        is_head = any(_is_within(path, head) for head in heads)
        found.append(replace(_describe(module, name, path, adapter, owners), output_head=is_head, tower=tower))
    return tuple(found)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _is_within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def plain_model(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the model inside what torch.compile, DDP and peft put around it, and the path to it."""
    inner, outer = model, None
    while inner is not outer:
        inner, outer = _inside(inner), inner
    path = next(path for path, module in model.named_modules() if module is inner)
    return path, inner


def _inside(model: nn.Module) -> nn.Module:
    """Return what one layer of wrapping holds, or the model itself if it is not wrapped."""
    held = next((children(model)[name] for name in HOLDING if name in children(model)), None)
    if held is not None:
        return held
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        inner: nn.Module = model.module
        return inner
    peft = sys.modules.get("peft")  # without it imported there is no PeftModel
    if peft is not None and isinstance(model, peft.PeftModel):
        return model.get_base_model()  # type: ignore[no-any-return]
    if peft is not None and isinstance(model, peft.PeftMixedModel):
        return model.base_model.model  # type: ignore[no-any-return]
    return model


def _held(module: nn.Module) -> str | None:
    """Return under which name a layer of peft's, or what torch put around a part, holds the model's own.

    None for the model's own modules.
    """
    held = next((name for name in HOLDING if name in children(module)), None)
    if held is not None:
        return held
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return "module"
    tuners, other = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    if tuners is not None and isinstance(module, tuners.BaseTunerLayer):
        return "base_layer"
    if other is not None and isinstance(module, other.AuxiliaryTrainingWrapper):
        return "original_module"
    return None


def _walk(module: nn.Module, name: str, path: str, adapter: bool) -> Iterator[tuple[str, str, nn.Module, bool]]:
    """Yield (plain name, path, module, is an adapter); what holds a layer of the model is passed over for that."""
    own = _held(module)
    if own is None:
        yield name, path, module, adapter
    for child_name, child in module.named_children():
        child_path = _joined(path, child_name)
        if child_name == own:
            yield from _walk(child, name, child_path, adapter)
        else:
            yield from _walk(child, _joined(name, child_name), child_path, adapter or own is not None)


def _describe(module: nn.Module, name: str, path: str, adapter: bool, owners: dict[int, str]) -> Module:
    own = dict(module.named_parameters(recurse=False))
    first = [parameter for parameter in own.values() if owners.setdefault(id(parameter), name) == name]
    weight = own.get("weight")
    owner = owners[id(weight)] if weight is not None else name
    largest = weight if weight is not None else max(own.values(), key=torch.numel, default=None)
    shape = tuple(largest.shape) if largest is not None else ()
    count = sum(parameter.numel() for parameter in first)
    if isinstance(module, PackedLinear):
        shape = module.out_features, module.in_features
        count += prod(shape) - sum(parameter.numel() for parameter in module.stored.values())
    return Module(
        name,
        path,
        type(module).__name__,
        type(module) in (nn.Linear, QuantLinear, PackedLinear),
        shape,
        count,
        sum(parameter.numel() * parameter.element_size() for parameter in first),
        owner if owner != name else None,
        adapter,
        tuple(key for key, parameter in own.items() if owners[id(parameter)] != name),
        0 if weight is None else weight.numel() * weight.element_size(),
    )
