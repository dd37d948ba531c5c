"""Where a module stands in its model: the number of its layer, and what it is called there."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_NUMBER = re.compile(r"(?:\A|\.)(\d+)(?=\.|\Z)")


@dataclass(frozen=True)
class Place:
    """The layer's number, None outside of layers; and the rest of the module's name."""

    layer: int | None
    projection: str


def place_of(module: str) -> Place:
    """Return the place of a module: its first number is its layer's."""
    match = _NUMBER.search(module)
    if match is None:
        return Place(None, module)
    before, after = module[: match.start()], module[match.end() :]
    return Place(int(match[1]), f"{before}{after}".lstrip("."))


def places(modules: Iterable[str]) -> dict[str, Place]:
    """Return the places of modules, by their names; what all of those in layers begin with is left out."""
    found = {module: place_of(module) for module in modules}
    layered = [one.projection.split(".") for one in found.values() if one.layer is not None]
    shared = 0
    while layered and all(len(parts) > shared + 1 for parts in layered):
        if len({parts[shared] for parts in layered}) > 1:
            break
        shared += 1
    return {
        module: one if one.layer is None else Place(one.layer, ".".join(one.projection.split(".")[shared:]))
        for module, one in found.items()
    }
