"""Times of alternatives as ratios: each round runs all of them in turn, so that a drifting machine changes no ratio."""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def take_fresh_memory() -> None:
    """Make every large tensor's memory come from the system, as in a process that has just begun.

    Otherwise the allocator hands out pages that something else has touched already, or not, as it happens: a clone of
    32 MB then takes 2 ms at one time and 10 ms at another.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, 1 << 20)
            mallopt(M_TRIM_THRESHOLD, 1 << 24)  # what is small is used again, not given back and fetched anew


def medians(
    acts: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds of each of ``acts``, run in turn ``rounds`` times after one time that does not count.

    What takes under a millisecond runs several times a round. ``time.process_time`` as the clock leaves out what other
    processes take of the machine.
    """
    taken: dict[str, list[float]] = {name: [] for name in acts}
    times: dict[str, int] = {}
    for name, act in acts.items():
        _timed(act, 1, device, clock)
        times[name] = max(1, round(1e-3 / max(_timed(act, 1, device, clock), 1e-6)))
    for _ in range(rounds):
        for name, act in acts.items():
            taken[name].append(_timed(act, times[name], device, clock))
    return {name: statistics.median(of) for name, of in taken.items()}


def _timed(act: Callable[[], object], count: int, device: str, clock: Callable[[], float]) -> float:
    if device != "cpu":
        torch.accelerator.synchronize()
    start = clock()
    for _ in range(count):
        act()
    if device != "cpu":
        torch.accelerator.synchronize()
    return (clock() - start) / count
