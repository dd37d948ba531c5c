"""The modules of a model, live or on the meta device, under the names of the plain model.

A module of a kind that has several weights (see ``layers.kinds``) is listed once for each of them, under the module's
name and the weight's: what is decided, recorded and reported is decided for one weight of one module.

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

from qsurgeon.layers import PackedLayer, Quantization, Weight, quant_layers
from qsurgeon.layers.kinds import Kind, in_order, kind_of
from qsurgeon.layers.layer import USUAL
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
    """One module of a model, or one weight of a module that has several.

    name: in the plain model, what patterns are matched with. path: of the module, in the model as it is. kind: its
    class. wraps: the kind that it is wrapped as, if it is of one. shape: of its weight, or of its largest own
    parameter. parameters: how many it owns (children not counted, a tied weight counted with its first owner only; what
    belongs to no weight is counted with the module's first). bytes: what these take. A packed weight counts as the
    values that it stands for, in shape and parameters, and with the bytes that it takes. tied_weight: the full name of
    its weight in the module that owns it, if that is another one. adapter: whether peft added it.
    shared: the full names of those of its parameters that another module owns. weight_bytes: what its weight takes, its
    own or shared. weight: the name of its parameter. types: the kinds that there are in the whole model, by name.
    output_head: whether it computes the model's outputs, or lies in what does. tower: the sub-model it belongs to, if
    that reads no text (see ``parts``).
    readers: the code that takes its weight itself (see ``reads``), where that was asked for.
    """

    name: str
    path: str
    kind: str
    wraps: Kind | None
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    tied_weight: str
    adapter: bool
    shared: tuple[str, ...] = ()
    weight_bytes: int = 0
    output_head: bool = False
    tower: Tower | None = None
    readers: tuple[Reader, ...] = ()
    weight: str = USUAL
    types: tuple[str, ...] = ()

    @property
    def tied_to(self) -> str | None:
        """The module that owns its weight, if that is another one."""
        return self.tied_weight.rpartition(".")[0] or None

    @property
    def type(self) -> str:
        """What recipes call its kind in ``types``; nothing for what cannot be wrapped."""
        return "" if self.wraps is None or self.adapter else self.wraps.name

    @property
    def parameter(self) -> str:
        """The full name of its weight in the plain model."""
        several = self.wraps is not None and len(self.wraps.weights) > 1
        return self.name if several else f"{self.name}.{self.weight}"

    @property
    def module(self) -> str:
        """The name of the module itself, in the plain model."""
        return self.parameter.removesuffix(f".{self.weight}")

    @property
    def declared(self) -> Weight:
        """Its weight as its kind declares it."""
        assert self.wraps is not None
        return next(one for one in self.wraps.weights if one.name == self.weight)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of its weight as (…, outputs, inputs)."""
        return self.declared.row_shape(self.shape)


def inventory(model: nn.Module) -> tuple[Module, ...]:
    """Return every module of ``model`` but the root, in the model's order."""
    root_path, root = plain_model(model)
    owners: dict[int, tuple[str, str]] = {}
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
        for one in _describe(module, name, path, adapter, owners):
            found.append(replace(one, output_head=is_head, tower=tower))
    types = in_order(one.type for one in found)
    return tuple(replace(one, types=types) for one in found)


def quantizations(model: nn.Module) -> dict[str, Quantization]:
    """Return how each weight that is wrapped computes, by its name in the inventory."""
    layers = quant_layers(model)
    return {
        module.name: layers[module.path].quantizations[module.weight]
        for module in inventory(model)
        if module.path in layers and module.weight in layers[module.path].quantizations
    }


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


def _describe(
    module: nn.Module, name: str, path: str, adapter: bool, owners: dict[int, tuple[str, str]]
) -> Iterator[Module]:
    """Yield the module, once for each weight of its kind. ``owners``: who was seen first with each parameter."""
    own = dict(module.named_parameters(recurse=False))
    first = {key for key, one in own.items() if owners.setdefault(id(one), (name, key))[0] == name}
    kind = kind_of(module)
    keys = [one.name for one in kind.weights] if kind is not None else [USUAL]
    largest = own.get(keys[0], max(own.values(), key=torch.numel, default=None))
    counts = {key: own[key].numel() if key in first else 0 for key in own}
    sizes = {key: counts[key] * own[key].element_size() for key in own}
    shapes = {
        key: tuple(own[key].shape) if key in own else () if largest is None else tuple(largest.shape) for key in keys
    }
    if isinstance(module, PackedLayer):
        (key,) = keys
        shapes[key] = module.weights[0].row_shape(module.features)
        counts[key] = counts.get(key, 0) + prod(module.features) - sum(one.numel() for one in module.stored.values())
    for at, key in enumerate(keys):
        taken = counts.keys() - set(keys[1:]) if at == 0 else {key} & counts.keys()
        owner, owned = owners[id(own[key])] if key in own else (name, key)
        yield Module(
            name if kind is None else kind.entry(name, key),
            path,
            type(module).__name__,
            kind,
            shapes[key],
            sum(counts[one] for one in taken),
            sum(sizes.get(one, 0) for one in taken),
            f"{owner}.{owned}" if owner != name else "",
            adapter,
            tuple(f"{name}.{one}" for one in own if one in taken and owners[id(own[one])][0] != name),
            own[key].numel() * own[key].element_size() if key in own else 0,
            weight=key,
        )
