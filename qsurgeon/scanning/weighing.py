"""Measure weights as they are stored: slab by slab, several modules at a time, without loading a model."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from qsurgeon.checkpoint import Events
from qsurgeon.errors import CheckpointError
from qsurgeon.formats import Format
from qsurgeon.formats.kernels.arithmetic import scale_of
from qsurgeon.formats.rotation import Rotation, rotated
from qsurgeon.layers import Quantization
from qsurgeon.scanning.measures import Sums, measure, total
from qsurgeon.scanning.result import Row
from qsurgeon.scanning.stored import Slabs, Weights
from qsurgeon.scanning.unfinished import Unfinished
from qsurgeon.surgery import Module


def weigh(rows: Sequence[Row], weights: Weights, unfinished: Unfinished, events: Events, workers: int) -> list[Row]:
    """Return ``rows`` with the measures of their weights; ``events`` hears of every byte of a weight that is done.

    Raises: CheckpointError as ``Weights.opened``, and for a weight that is not finite.
    """
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        tasks.setdefault(row.module, []).append(row)
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        # The largest first, so that no thread is left alone with it in the end.
        order = sorted(tasks.values(), key=lambda same: -same[0].values)
        made = [pool.submit(_weighed, same, weights, unfinished, events) for same in order]
        found = {row.module + "\n" + row.name: row for task in made for row in task.result()}
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
    return [found[row.module + "\n" + row.name] for row in rows]


def _weighed(rows: list[Row], weights: Weights, unfinished: Unfinished, events: Events) -> list[Row]:
    """Return the rows of one module with the measures of its weight."""
    module = rows[0].step.module
    unit = f"weight {module.name}"
    found = unfinished.found(unit)
    if found is None:
        hows = {row.name: row.how for row in rows if row.choice.weight is not None}
        with weights.opened(module) as slabs:
            found = {name: sums.raw() for name, sums in _measured(module, hows, slabs).items()}
        unfinished.add(unit, found)
    with unfinished.lock:
        events.advance(module.weight_bytes)
    return [replace(row, weight=Sums.of_raw(found[row.name]) if row.name in found else None) for row in rows]


def _measured(module: Module, hows: Mapping[str, Quantization], slabs: Slabs) -> dict[str, Sums]:
    """Return what each of ``hows`` does to the weight that ``slabs`` yields."""
    grids = {name: grid for name, how in hows.items() if (grid := how.weight_grid) is not None}
    if not grids:
        return {}
    height = _height(grids.values())
    rotations = {name: hows[name].rotation for name in grids}
    tops = _tops(
        slabs, height, {name: rotations[name] for name, grid in grids.items() if grid.tensor_scale == "tensor"}
    )
    found: dict[str, list[Sums]] = {name: [] for name in grids}
    for slab in slabs(height):
        for name, grid in grids.items():
            above = None if name not in tops else scale_of(torch.tensor([[tops[name]]]), grid)
            found[name].append(measure(rotated(slab, rotations[name]), grid, above))
    sums = {name: total(every) for name, every in found.items()}
    for one in sums.values():
        if not math.isfinite(one.x2 + one.e2):
            raise CheckpointError(f"{module.parameter} has values that are not finite; it cannot be scanned")
    return sums


def _height(grids: Any) -> int:
    """Return what the rows of a slab are a multiple of, so that blocks are whole; 0 where it must be the whole weight.

    Stochastic rounding depends on a value's place in the whole.
    """
    every: list[Format] = list(grids)
    if any(grid.rounding == "stochastic" for grid in every):
        return 0
    return math.lcm(*(grid.block_shape[0] for grid in every))


def _tops(slabs: Slabs, height: int, rotations: Mapping[str, Rotation | None]) -> dict[str, float]:
    """Return the largest magnitude of the whole weight for each format whose tensor scale depends on it."""
    if not rotations:
        return {}
    tops = dict.fromkeys(rotations, 0.0)
    for slab in slabs(height):
        for name, rotation in rotations.items():
            tops[name] = max(tops[name], _largest(rotated(slab, rotation)))
    return tops


def _largest(x: torch.Tensor) -> float:
    low, high = torch.aminmax(x.float())
    return torch.maximum(high, -low).item()
