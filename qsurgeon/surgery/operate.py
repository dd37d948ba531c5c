"""The only place that replaces modules of a live model."""

import gc
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qsurgeon.errors import FormatError, ShapeError, SurgeryError
from qsurgeon.layers import PackedLinear, Quantization, QuantLinear, quant_linears
from qsurgeon.storage import PACKED, encoding_of
from qsurgeon.surgery.adapters import bypass, misreading
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
    """Wrap the modules that ``quantizations`` names (in the plain model), in place; return how many.

    Nothing is changed unless all of them can be. ``untie`` gives a wrapped module whose weight is tied to another's
    a copy of its own. ``storage: packed`` packs each weight that has a format, one after the other, the largest first,
    so that memory that does not suffice is missed before anything is changed. A weight that is packed is gone, and
    there is no way back: once the first is, an interruption waits until all are.

    Raises: SurgeryError if the model is wrapped already, or a module is missing or cannot be wrapped, or has an adapter
    that would compute past it, or take its codes for values; and, with the error that stopped it, for a model that is
    left half packed.
    """
    wrapped = quant_linears(model)
    if wrapped:
        raise SurgeryError(
            f"the model is wrapped already: {len(wrapped)} QuantLinear modules, the first is {next(iter(wrapped))}; "
            "apply a recipe to a model as it was loaded from a plain checkpoint"
        )
    modules = {module.name: module for module in inventory(model)}
    linears = _checked(model, modules, quantizations, storage)
    owners = {module.tied_to for module in modules.values()}
    tied = [name for name in linears if untie and (modules[name].tied_to or name in owners)]
    packed = [name for name in linears if _is_packed(quantizations[name], storage)]
    copies = {name: _copied(linears[name]) for name in tied if name not in packed}  # of packed ones the codes are
    encoding = encoding_of(storage)
    sizes = {name: linears[name].get_parameter("weight").numel() for name in packed}
    with uninterrupted():
        _pack_all({name: linears[name] for name in sorted(packed, key=sizes.__getitem__, reverse=True)}, quantizations)
        for name in packed if encoding not in (None, PACKED) else ():
            layer: Any = linears[name]
            layer.encode_as(encoding)
        for name, linear in linears.items():
            if name not in packed:
                QuantLinear.wrap(linear, quantizations[name], name)
        for name in tied:
            _untie(linears[name], name, copies.get(name), plain_model(model)[1])
    return len(linears)


def _checked(
    model: nn.Module, modules: Mapping[str, Module], quantizations: Mapping[str, Quantization], storage: Storage
) -> dict[str, nn.Module]:
    """Return the modules to wrap, by name. Raises: SurgeryError for the first that cannot be."""
    missing = [name for name in quantizations if name not in modules]
    if missing:
        raise SurgeryError(f"the model has no module {missing[0]} ({len(missing)} of {len(quantizations)} are missing)")
    linears = {name: model.get_submodule(modules[name].path) for name in quantizations}
    for name, linear in linears.items():
        is_packed = _is_packed(quantizations[name], storage)
        try:
            _check(linear, quantizations[name], is_packed)
        except (FormatError, ShapeError, SurgeryError) as error:
            raise SurgeryError(f"{name} cannot be wrapped: {error}") from error
        path = modules[name].path
        wrong = bypass(model, path)
        if wrong is None and is_packed:
            wrong = misreading(model, path)
        if wrong is not None:
            raise SurgeryError(f"{name} cannot be wrapped: {wrong}")
    times = Counter(map(id, linears.values()))
    twice = [name for name, linear in linears.items() if times[id(linear)] > 1]
    if twice:
        raise SurgeryError(f"{twice[0]} and {twice[1]} are one and the same module; exclude one of them")
    return linears


def _check(linear: nn.Module, how: Quantization, is_packed: bool) -> None:
    if is_packed:
        PackedLinear.check_packing(linear, how)
    else:
        QuantLinear.check(linear)
    weight: Any = linear.weight
    if weight.dtype not in _DTYPES:
        raise SurgeryError(f"its weight is {weight.dtype}; expected float32, bfloat16, float16 or float64")


def _pack_all(linears: Mapping[str, nn.Module], quantizations: Mapping[str, Quantization]) -> None:
    """Pack the weights of ``linears``, all of them once the first is packed.

    What stops one of them (Ctrl-C, or memory that others give back) is tried once more after the others.

    Raises: what stopped the first; SurgeryError for what stops another twice.
    """
    done, stopped = 0, list[tuple[str, BaseException]]()
    for name, linear in linears.items():
        try:
            PackedLinear.wrap(linear, quantizations[name], name)
        except BaseException as error:
            if not done:
                raise
            stopped.append((name, error))
            continue
        done += 1
    if not stopped:
        return
    with uninterrupted() as interrupts:
        for name, reason in stopped:
            gc.collect()
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            if not isinstance(reason, Exception):
                interrupts.keep(reason)
            try:
                PackedLinear.wrap(linears[name], quantizations[name], name)
            except BaseException as error:
                raise SurgeryError(
                    f"{name} could not be packed, after {done} other weights were: {type(error).__name__}: {error}. "
                    "The model is half packed, and cannot be used: load it again"
                ) from error


def _is_packed(how: Quantization, storage: Storage) -> bool:
    return encoding_of(storage) is not None and how.weight is not None


def _copied(linear: nn.Module) -> Tensor:
    return linear.get_parameter("weight").detach().clone()


def _untie(linear: nn.Module, name: str, copy: Tensor | None, root: Any) -> None:
    """Give ``linear`` ``copy`` as a weight of its own, and the model no reason to tie it again when it is saved."""
    if copy is not None:
        needs = linear.get_parameter("weight").requires_grad
        linear.register_parameter("weight", nn.Parameter(copy, requires_grad=needs))
    for path, model in root.named_modules():
        ties = getattr(model, "all_tied_weights_keys", None) or {}
        own = f"{name}.weight".removeprefix(f"{path}." if path else "")
        tied = [key for key, value in ties.items() if own in (key, value)]
        for key in tied:
            del ties[key]
        if tied:
            model.config.tie_word_embeddings = False
            model.config.get_text_config().tie_word_embeddings = False
