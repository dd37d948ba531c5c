"""The models for which `qsurgeon.reference` asked for a reference in full precision.

A trainer that trains an adapter loads no reference: it switches the adapter off.
"""

from weakref import WeakKeyDictionary

from torch import nn

from qsurgeon.errors import SurgeryError

_in_full_precision: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def remember(model: nn.Module, source: str, *, wrapped: bool) -> None:
    """Note what the reference of ``model`` is."""
    if wrapped:
        _in_full_precision.pop(model, None)
    else:
        _in_full_precision[model] = source


def refuse_an_adapter(model: nn.Module) -> None:
    """Do nothing if ``model`` can have an adapter. Raises: SurgeryError if its reference would not be what was told."""
    source = _in_full_precision.get(model)
    if source is not None:
        refuse_unloaded(source)


def refuse_unloaded(source: str) -> None:
    """Raises: SurgeryError, since a trainer of an adapter would never load ``source``."""
    raise SurgeryError(
        f"qsurgeon.reference(model, {source!r}, wrapped=False) has no effect with an adapter: a trainer's reference is "
        "then the model with its adapter off, which is wrapped. Train without an adapter (no peft_config), say "
        "wrapped=True, or compute the reference yourself, with the adapter off, inside qsurgeon.disabled(model)"
    )
