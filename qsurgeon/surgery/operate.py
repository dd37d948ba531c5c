"""The only place that replaces modules of a live model."""

import gc
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qsurgeon.errors import FormatError, ShapeError, SurgeryError
from qsurgeon.layers import Quantization, quant_layers
from qsurgeon.layers.kinds import KINDS, Kind, listed
from qsurgeon.storage import PACKED, encoding_of
from qsurgeon.surgery.adapters import bypass, misreading, staying_apart
from qsurgeon.surgery.interrupts import uninterrupted
from qsurgeon.surgery.inventory import Module, inventory, plain_model
from qsurgeon.words import Storage

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def operate(
    model: nn.Module,
    quantizations: Mapping[str, Quantization],
    *,
    untie: bool = False,
    storage: Storage = "master",
) -> int:
    """Wrap the modules whose weights ``quantizations`` names (as ``inventory`` does), in place; return how many.

    Nothing is changed unless all of them can be. ``untie`` gives a wrapped module whose weight is tied to another's
    a copy of its own. ``storage: packed`` packs each weight that has a format, one after the other, the largest first,
    so that memory that does not suffice is missed before anything is changed. A weight that is packed is gone, and
    there is no way back: once the first is, an interruption waits until all are.

    Raises: SurgeryError if the model is wrapped already, or a module is missing or cannot be wrapped, or has an adapter
    that would compute past it, or take its codes for values; and, with the error that stopped it, for a model that is
    left half packed.
    """
    wrapped = quant_layers(model)
    if wrapped:
        raise SurgeryError(
            f"the model is wrapped already: {_classes(wrapped)} modules, the first is {next(iter(wrapped))}; "
            "apply a recipe to a model as it was loaded from a plain checkpoint"
        )
    modules = {module.name: module for module in inventory(model)}
    targets = _checked(model, modules, quantizations, storage)
    owned = {module.tied_weight for module in modules.values()}
    tied = [name for name in quantizations if untie and _is_tied(modules[name], owned)]
    # Of what is packed, the codes are the copy.
    copies = {name: _copied(model, modules[name]) for name in tied if not _is_packed(quantizations[name], storage)}
    packed = sorted((one for one in targets if one.packs), key=lambda one: one.size, reverse=True)
    with uninterrupted():
        _pack_all(packed)
        encoding = encoding_of(storage)
        for target in packed if encoding not in (None, PACKED) else ():
            layer: Any = target.module
            layer.encode_as(encoding)
        for target in targets:
            if not target.packs:
                target.wrap()
        for name in tied:
            _untie(model, modules[name], copies.get(name))
    return len(targets)


def _classes(wrapped: Mapping[str, nn.Module]) -> str:
    counts = Counter(type(layer).__name__ for layer in wrapped.values())
    return " and ".join(f"{count} {name}" for name, count in counts.items())


@dataclass
class _Target:
    """A module to be wrapped, and how each of its weights computes, by the weight's name."""

    name: str
    module: nn.Module
    kind: Kind
    packs: bool
    hows: dict[str, Quantization]

    @property
    def size(self) -> int:
        """How many values its weights have."""
        return sum(self.module.get_parameter(one).numel() for one in self.hows)

    def check(self) -> None:
        """Do nothing if it can be wrapped. Raises: SurgeryError, FormatError, ShapeError."""
        self.kind.check(self.module, self.hows, packs=self.packs)
        for one in self.hows:
            weight: Any = getattr(self.module, one)
            if weight.dtype not in _DTYPES:
                raise SurgeryError(f"its {one} is {weight.dtype}; expected float32, bfloat16, float16 or float64")

    def wrap(self) -> None:
        """Wrap it."""
        self.kind.wrap(self.module, self.hows, self.name, packs=self.packs)


def _checked(
    model: nn.Module, modules: Mapping[str, Module], quantizations: Mapping[str, Quantization], storage: Storage
) -> list[_Target]:
    """Return what is to be wrapped. Raises: SurgeryError for the first that cannot be."""
    missing = [name for name in quantizations if name not in modules]
    if missing:
        raise SurgeryError(f"the model has no module {missing[0]} ({len(missing)} of {len(quantizations)} are missing)")
    targets: dict[str, _Target] = {}  # by path
    for name, how in quantizations.items():
        one = modules[name]
        module = model.get_submodule(one.path)
        if one.wraps is None:
            names = listed(kind.source_name for kind in KINDS.values())
            raise SurgeryError(f"{name} cannot be wrapped: it is a {type(module).__qualname__}, not {names} itself")
        target = targets.setdefault(one.path, _Target(one.module, module, one.wraps, False, {}))
        target.hows[one.weight] = how
        target.packs = target.packs or _is_packed(how, storage)
    for path, target in targets.items():
        try:
            target.check()
        except (FormatError, ShapeError, SurgeryError) as error:
            raise SurgeryError(f"{target.name} cannot be wrapped: {error}") from error
        wrong = bypass(model, path)
        if wrong is None and target.packs:
            wrong = misreading(model, path)
        if wrong is None and any(how.behavior.adapters == "merged" for how in target.hows.values()):
            wrong = staying_apart(model, path)
        if wrong is not None:
            raise SurgeryError(f"{target.name} cannot be wrapped: {wrong}")
    times = Counter(id(target.module) for target in targets.values())
    twice = [target.name for target in targets.values() if times[id(target.module)] > 1]
    if twice:
        raise SurgeryError(f"{twice[0]} and {twice[1]} are one and the same module; exclude one of them")
    return list(targets.values())


def _pack_all(targets: Sequence[_Target]) -> None:
    """Pack the weights of ``targets``, all of them once the first is packed.

    What stops one of them (Ctrl-C, or memory that others give back) is tried once more after the others.

    Raises: what stopped the first; SurgeryError for what stops another twice.
    """
    done, stopped = 0, list[tuple[_Target, BaseException]]()
    for target in targets:
        try:
            target.wrap()
        except BaseException as error:
            if not done:
                raise
            stopped.append((target, error))
            continue
        done += 1
    if not stopped:
        return
    with uninterrupted() as interrupts:
        for target, reason in stopped:
            gc.collect()
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            if not isinstance(reason, Exception):
                interrupts.keep(reason)
            try:
                target.wrap()
            except BaseException as error:
                raise SurgeryError(
                    f"{target.name} could not be packed, after {done} other weights were: {type(error).__name__}: "
                    f"{error}. The model is half packed, and cannot be used: load it again"
                ) from error


def _is_packed(how: Quantization, storage: Storage) -> bool:
    return encoding_of(storage) is not None and how.weight is not None


def _is_tied(module: Module, owned: Collection[str]) -> bool:
    return module.tied_to is not None or module.parameter in owned


def _copied(model: nn.Module, module: Module) -> Tensor:
    return model.get_submodule(module.path).get_parameter(module.weight).detach().clone()


def _untie(model: nn.Module, module: Module, copy: Tensor | None) -> None:
    """Give a module ``copy`` as a weight of its own, and the model no reason to tie it again when it is saved."""
    if copy is not None:
        layer = model.get_submodule(module.path)
        needs = layer.get_parameter(module.weight).requires_grad
        layer.register_parameter(module.weight, nn.Parameter(copy, requires_grad=needs))
    root: Any = plain_model(model)[1]
    for path, inner in root.named_modules():
        ties = getattr(inner, "all_tied_weights_keys", None) or {}
        own = module.parameter.removeprefix(f"{path}." if path else "")
        tied = [key for key, value in ties.items() if own in (key, value)]
        for key in tied:
            del ties[key]
        if tied:
            inner.config.tie_word_embeddings = False
            inner.config.get_text_config().tie_word_embeddings = False
