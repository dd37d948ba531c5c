"""One line that says how much of a model is wrapped: by parameters first, because modules differ in size.

Everything that says it says it with this: ``plan``, ``inspect`` of a live model, a folder or a hub id, ``apply``,
``qsurgeon run`` and the model card.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from qsurgeon.layers import Quantization
from qsurgeon.layers.kinds import in_order, listed
from qsurgeon.surgery.inventory import Module, inventory, quantizations
from qsurgeon.visible import one_line


@dataclass(frozen=True)
class Part:
    """One module's part in a headline.

    kind: its class. type: what recipes call its kind, if it could be wrapped. adapter: whether peft added it. how: what
    it computes with, in words; nothing for one that stays as it is.
    """

    parameters: int
    kind: str
    type: str
    adapter: bool
    how: str

    @classmethod
    def of(cls, module: Module, quantization: Quantization | None) -> "Part":
        """Return the part of a module that computes as ``quantization`` says, or stays as it is."""
        how = (
            ""
            if quantization is None
            else in_words(quantization.weight_name, quantization.input_name, quantization.when)
        )
        return cls(module.parameters, module.kind, module.type, module.adapter, how)


def in_words(weight: str, input: str, when: str = "") -> str:
    """Return what a wrapped module computes with, and in which phase, where that is not each."""
    return f"weight {weight}, input {input}" + (f", {when}" if when else "")


def headline(parts: Iterable[Part], remarks: Sequence[str] = (), resting: str = "") -> str:
    """Return how much of a model is wrapped, in which formats, and how much no rule could wrap.

    ``remarks``: what else there is to say of the wrapped modules. ``resting``: how many of them do not round now.
    """
    parts = tuple(parts)
    count = sum(bool(part.type) for part in parts)
    types = in_order(part.type for part in parts)
    hows = Counter(part.how for part in parts if part.how)
    if not hows:
        return f"full precision: none of {count} {listed(types, 'and')} modules is wrapped"
    everything = sum(part.parameters for part in parts) or 1
    wrapped = percent(sum(part.parameters for part in parts if part.how) / everything)
    said = [*(f"{count} with {how}" for how, count in hows.items()), *remarks]
    return one_line(
        f"{wrapped} of the parameters are wrapped, in {hows.total()} of {count} {listed(types, 'and')} modules"
        f"{_elsewhere(parts, types, everything)}{resting}: {'; '.join(said)}"
    )


def headline_of(model: nn.Module) -> str:
    """Return the headline of a live model: of what its layers are now, whatever its config says."""
    hows = quantizations(model)
    return headline(Part.of(module, hows.get(module.name)) for module in inventory(model))


def _elsewhere(parts: Sequence[Part], types: Sequence[str], everything: int) -> str:
    """Return what share of the parameters lies where no rule reaches, and in which modules most of that lies."""
    kinds: dict[str, int] = defaultdict(int)
    for part in parts:
        if not part.type and not part.adapter:
            kinds[part.kind] += part.parameters
    others = sum(kinds.values())
    if not others:
        return ""
    largest = max(kinds, key=lambda kind: kinds[kind])
    most = "most" if kinds[largest] * 2 > others else "the largest part"
    return f" ({percent(others / everything)} are in no {listed(types)}, {most} in {largest})"


def percent(share: float) -> str:
    """Return a share as text that never says none, or all, of what is not."""
    text = f"{share:.1%}"
    if share > 0 and text == "0.0%":
        return "under 0.1%"
    return "over 99.9%" if share < 1 and text == "100.0%" else text
