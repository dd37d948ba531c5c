"""Which parameter of the model a stored tensor becomes: checkpoints and modules do not always share names.

transformers renames what it loads (``visual.blocks…`` to ``model.visual.blocks…``), joins what is stored in parts,
splits what is stored as one, and adds or drops the base model's prefix. Its own mapping is asked here, and in ``kept``.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from qsurgeon.checkpoint.reading.headers import BITS, Tensor
from qsurgeon.transformers_private.loading import (
    WeightConverter,
    dot_natural_key,
    get_model_conversion_mapping,
    loaded_name,
    sorted_transforms,
)

# What an operation raises that is given tensors that it was not made for.
_UNFIT = (ValueError, RuntimeError, IndexError)


@dataclass(frozen=True)
class Conversion:
    """Stored tensors that transformers makes one or more parameters of: it splits, joins, permutes or turns them.

    converter: what does it. target: the first of the parameters. parts: the names of the tensors, by the pattern that
    names them.
    """

    converter: WeightConverter
    target: str
    parts: Mapping[str, tuple[str, ...]]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the stored tensors."""
        return tuple(name for names in self.parts.values() for name in names)

    def run(self, model: Any, make: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what is made of the tensors that ``make`` returns for the stored ones, by the parameters' names.

        Nothing is returned for tensors that the conversion does not take.
        """
        converter = deepcopy(self.converter)
        try:
            for pattern, names in self.parts.items():
                for name in names:
                    values: Any = make(name)
                    converter.add_tensor(self.target, name, pattern, values)
            made = converter.convert(self.target, model=model, config=model.config)
        except _UNFIT:
            return {}
        return {name: values[0] if isinstance(values, list) else values for name, values in made.items()}


@dataclass(frozen=True)
class Names:
    """What becomes of the tensors of a checkpoint.

    stored: the tensor's name, by the name of the parameter that it is loaded into as it is. converted: what a parameter
    is made by, by its name. unknown: tensors that the model has no place for. missing: parameters that no tensor is
    loaded into.
    """

    stored: dict[str, str]
    converted: dict[str, Conversion]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]


def names_in(model: Any, tensors: Mapping[str, Tensor]) -> Names:
    """Return what ``model``, which may be on the meta device, makes of ``tensors`` when it is loaded from them."""
    transforms = sorted_transforms(get_model_conversion_mapping(model))
    by_pattern = {pattern: one for one in transforms[1] for pattern in one.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    stored: dict[str, str] = {}
    parts: dict[str, dict[str, list[str]]] = {}
    unknown: list[str] = []
    for tensor in sorted(tensors, key=dot_natural_key):  # as they are loaded, which is how those of a list are joined
        name, pattern = loaded_name(tensor, transforms, prefix, state)
        if name not in state:
            unknown.append(tensor)
        elif pattern is None:
            stored[name] = tensor
        else:
            parts.setdefault(name, {}).setdefault(pattern, []).append(tensor)
    converted: dict[str, Conversion] = {}
    for target, found in parts.items():
        frozen = {pattern: tuple(names) for pattern, names in found.items()}
        conversion = Conversion(by_pattern[next(iter(frozen))], target, frozen)
        converted |= dict.fromkeys(_made_by(conversion, model, tensors), conversion)
    filled = stored.keys() | converted.keys()
    return Names(stored, converted, tuple(unknown), tuple(_unfilled(model, filled)))


def _made_by(conversion: Conversion, model: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the parameters that a conversion makes."""
    if len(conversion.converter.target_patterns) == 1 and "*" not in conversion.converter.target_patterns[0]:
        return [conversion.target]
    made = conversion.run(model, lambda name: torch.empty(tensors[name].shape, device="meta"))
    return list(made) or [conversion.target]


def _unfilled(model: Any, filled: set[str]) -> Iterator[str]:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # one that is tied has several names
        owners.setdefault(id(parameter), []).append(name)
    return (names[0] for names in owners.values() if filled.isdisjoint(names))


def rows_of(conversion: Conversion, name: str, model: Any, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Return the runs of whole rows of the stored ``tensors`` that the parameter ``name`` consists of, in its order.

    Nothing is returned for one whose rows are not rows of theirs. What the conversion does is found by converting
    tensors of two columns that say which row they are.
    """
    sources = [tensors[one] for one in conversion.tensors]
    columns = {prod(one.shape[1:]) for one in sources}
    if any(len(one.shape) < 2 for one in sources) or len(columns) != 1 or len({one.dtype for one in sources}) != 1:
        return ()
    first, marked = 0, {}
    for one in sources:
        rows = torch.arange(2 * first, 2 * (first + one.shape[0])).view(-1, *[1] * (len(one.shape) - 2), 2)
        marked[one.name], first = rows, first + one.shape[0]
    found = conversion.run(model, marked.__getitem__).get(name)
    if found is None or found.dim() != 2 or found.shape[1] != 2 or not torch.equal(found[:, 0] + 1, found[:, 1]):
        return ()
    return tuple(_runs(sources, (found[:, 0] // 2).tolist(), columns.pop()))


def _runs(sources: list[Tensor], rows: list[int], columns: int) -> Iterator[Tensor]:
    """Yield ``rows``, counted through all ``sources``, as tensors of their own: as few as there can be."""
    places = [(one, row) for one in sources for row in range(one.shape[0])]
    start = 0
    for at in range(1, len(rows) + 1):
        goes_on = at < len(rows) and rows[at] == rows[at - 1] + 1 and places[rows[at]][0] is places[rows[start]][0]
        if goes_on:
            continue
        one, row = places[rows[start]]
        size = columns * BITS[one.dtype] // 8
        count = at - start
        yield replace(one, shape=(count, columns), start=one.start + row * size, size=count * size)
        start = at
