"""Formats to test, generated from the registries: a new element, scale, rule or word is among them at once.

Not all combinations, which are thousands: so many that each two values that go together are together in one of them,
as far as a format can have both.
"""

import heapq
from collections.abc import Mapping, Sequence
from itertools import combinations, cycle, product
from typing import Any, get_args

import torch

from qsurgeon.errors import FormatError
from qsurgeon.formats import CATALOG, Format, get_format
from qsurgeon.formats.element import ELEMENTS
from qsurgeon.formats.fields import NONE, Rounding, TensorScale, shown
from qsurgeon.formats.scale import RULES, SCALES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS: tuple[Any, ...] = (NONE, 1, 7, 12, 16, 32, [16, 16], [5, 24])
_START = get_format("mxfp4")
_NUMBER = 0.01  # of a static tensor scale


def scales_with_rules() -> list[tuple[str, str]]:
    """Return each scale with each rule that finds it, of any element; no scale with no rule."""
    found = [(name, rule) for name, scale in SCALES.items() for rule in RULES if RULES[rule].fits(scale)]
    return [*found, (NONE, NONE)]


def axes() -> dict[str, Sequence[Any]]:
    """Return the values that the formats are made of, by field; a scale and its rule are one."""
    return {
        "element": [*ELEMENTS],
        "block": BLOCKS,
        "scale": scales_with_rules(),
        "tensor_scale": get_args(TensorScale),
        "rounding": get_args(Rounding),
        "four_over_six": [False, True],
    }


def made(values: Mapping[str, Any]) -> Format | None:
    """Return the format of these values, named by them; None if they do not combine."""
    scale, rule = values["scale"]
    fields = {**values, "scale": scale, "scale_rule": rule}
    fields["static_scale"] = _NUMBER if values["tensor_scale"] == "static" else NONE
    fields["seed"] = 5 if values["rounding"] == "stochastic" else 0
    block = shown(values["block"])
    name = "-".join((values["element"], block, scale, rule, values["tensor_scale"], values["rounding"]))
    try:
        return _START.with_fields(f"{name}-4/6" if values["four_over_six"] else name, **fields)
    except FormatError:
        return None


def covering(all_axes: Mapping[str, Sequence[Any]], together: int = 2) -> list[Format]:
    """Return few formats in which each ``together`` values of different axes meet, if any format has them all.

    The same each time. Of the formats that are possible, the one with most of what is missing comes next.
    """
    possible: dict[tuple[int, ...], Format] = {}
    for place in product(*(range(len(values)) for values in all_axes.values())):
        fmt = made({name: values[at] for (name, values), at in zip(all_axes.items(), place, strict=True)})
        if fmt is not None:
            possible[place] = fmt
    left = {meeting for place in possible for meeting in combinations(enumerate(place), together)}
    queue = [(-len(left), order, place) for order, place in enumerate(possible)]
    chosen = []
    while left:
        _, order, place = heapq.heappop(queue)
        meetings = set(combinations(enumerate(place), together))
        gain = len(meetings & left)
        if queue and -gain > queue[0][0]:
            heapq.heappush(queue, (-gain, order, place))
            continue
        chosen.append(possible[place])
        left -= meetings
    return chosen


def roles(fmt: Format) -> list[Format]:
    """Return what a format is for a weight and for an input, the same thing once."""
    both = [fmt.as_weight] if fmt.is_two_dimensional else [fmt.as_weight, fmt.as_input]
    return list({one.key: one for one in both}.values())


GENERATED = covering(axes())
VARIANTS = [*CATALOG.values(), *GENERATED]
# A rotation is done before any kernel: some have one.
ROTATED = [fmt.with_fields(f"{fmt.name}-rotated", hadamard=16, seed=3) for fmt in GENERATED[::16]]
# Each format of the catalogue in each dtype; the others in one of them, in turn: a kernel takes a second to compile.
CASES = [*product(CATALOG.values(), DTYPES), *zip([*GENERATED, *ROTATED], cycle(DTYPES), strict=False)]
