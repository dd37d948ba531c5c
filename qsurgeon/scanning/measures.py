"""What rounding does to a tensor, as sums that add up: over the slabs of a weight, over batches, over layers.

Everything is computed in float32 of the upcast tensor, where a rotation has rotated it, and summed up in float64: a
statistic of bfloat16 numbers would be rounded itself.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from qsurgeon.formats import Format, under
from qsurgeon.formats.kernels import arithmetic
from qsurgeon.formats.quality import decibels, gaussian
from qsurgeon.formats.scale import FP32

PERCENTILES = (1, 50, 99, 100)  # of the largest magnitudes of blocks
CAUSES = ("scale", "clipping", "deadzone", "grid")
_BINS = 64  # for an octave: a percentile is right to 1.1 %
_ZERO = -(2**20)  # the bin of blocks of zeros


@dataclass(frozen=True)
class Sums:
    """Sums over the values x of a tensor and their errors e = q(x) − x; two of them can be added.

    count: values. x1 … x4: Σx, Σx², Σx³, Σx⁴. absolute: Σ|x|. e1, e2: Σ|e|, Σe². ratio: Σ|e|/|x|, where x is not 0.
    zeroed: values that are not 0 and become 0. clipped: values beyond the largest that their block can hold.
    blocks, clipped_blocks: of values that share a scale (a row, where the format has no blocks), and how many of them
    have a value that is clipped. scale, clipping, deadzone, grid: what of e2 is due to what, see ``measure``.
    tops: blocks by the logarithm of their largest magnitude.
    """

    count: int = 0
    x1: float = 0.0
    x2: float = 0.0
    x3: float = 0.0
    x4: float = 0.0
    absolute: float = 0.0
    e1: float = 0.0
    e2: float = 0.0
    ratio: float = 0.0
    zeroed: int = 0
    clipped: int = 0
    blocks: int = 0
    clipped_blocks: int = 0
    scale: float = 0.0
    clipping: float = 0.0
    deadzone: float = 0.0
    grid: float = 0.0
    peak: float = 0.0
    tops: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: "Sums") -> "Sums":
        added = {name: getattr(self, name) + getattr(other, name) for name in _ADDED}
        return Sums(**added, peak=max(self.peak, other.peak), tops=self.tops + other.tops)

    @property
    def sqnr(self) -> float:
        """The signal-to-quantization-noise ratio 10 · log10(Σx² / Σe²), in dB; infinity where nothing was lost."""
        return decibels(self.x2, self.e2)

    @property
    def relative_l2(self) -> float:
        """‖e‖ / ‖x‖."""
        return math.sqrt(_share(self.e2, self.x2))

    @property
    def relative_mean(self) -> float:
        """Mean |e| / mean |x|."""
        return _share(self.e1, self.absolute)

    @property
    def mean_relative(self) -> float:
        """The mean of |e| / |x|, in which a value that becomes zero counts 1: the "~21 %" of Gaussian MXFP4."""
        return _share(self.ratio, self.count)

    @property
    def zeroed_share(self) -> float:
        """The share of values that are not zero and become zero."""
        return _share(self.zeroed, self.count)

    @property
    def clipped_share(self) -> float:
        """The share of values that are beyond the largest that their block can hold."""
        return _share(self.clipped, self.count)

    @property
    def clipped_block_share(self) -> float:
        """The share of blocks with such a value."""
        return _share(self.clipped_blocks, self.blocks)

    @property
    def kurtosis(self) -> float:
        """The fourth central moment over the square of the second: 3 of a Gaussian."""
        if not self.count:
            return math.nan
        m1, m2, m3, m4 = (getattr(self, f"x{power}") / self.count for power in (1, 2, 3, 4))
        variance = m2 - m1**2
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        return fourth / variance**2 if variance > 0 else math.nan

    @property
    def causes(self) -> dict[str, float]:
        """The share of Σe² by its cause; they add up to 1 (to nothing, where nothing was lost)."""
        return {cause: _share(getattr(self, cause), self.e2) for cause in CAUSES}

    def top(self, percent: int) -> float:
        """Return this percentile of the blocks' largest magnitudes, in units of the root mean square of all values."""
        rms = math.sqrt(_share(self.x2, self.count))
        if not self.blocks or not rms:
            return math.nan
        if percent == PERCENTILES[-1]:
            return self.peak / rms
        wanted, seen = self.blocks * percent / 100, 0
        for place in sorted(self.tops):
            seen += self.tops[place]
            if seen >= wanted:
                break
        return 0.0 if place == _ZERO else min(float(2.0 ** ((place + 0.5) / _BINS)), self.peak) / rms

    def to_dict(self) -> dict[str, Any]:
        """Return what the sums come to, as JSON-ready values; null where a number is not finite."""
        named = {
            "sqnr_db": self.sqnr,
            "relative_l2": self.relative_l2,
            "relative_mean": self.relative_mean,
            "mean_relative_error": self.mean_relative,
            "zeroed": self.zeroed_share,
            "clipped": self.clipped_share,
            "clipped_blocks": self.clipped_block_share,
            "kurtosis": self.kurtosis,
        }
        tops = {f"p{percent}" if percent < 100 else "max": finite(self.top(percent)) for percent in PERCENTILES}
        return {
            "values": self.count,
            **{name: finite(value) for name, value in named.items()},
            "block_amax_over_rms": tops,
            "causes": self.causes,
        }

    def raw(self) -> list[Any]:
        """Return the sums themselves as JSON-ready values, exactly; ``of_raw`` undoes it."""
        return [*(getattr(self, name) for name in _ADDED), self.peak, [*map(list, sorted(self.tops.items()))]]

    @classmethod
    def of_raw(cls, values: list[Any]) -> Self:
        """Return the sums that ``raw`` returned."""
        *added, peak, tops = values
        return cls(**dict(zip(_ADDED, added, strict=True)), peak=peak, tops=Counter(dict(tops)))


_ADDED = tuple(one.name for one in fields(Sums) if one.name not in ("peak", "tops"))


def finite(value: float) -> float | None:
    """Return a number as JSON can hold it: null for infinity and NaN."""
    return value if math.isfinite(value) else None


def total(every: Iterable[Sums]) -> Sums:
    """Return the sums of all that was summed."""
    return sum(every, Sums())


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def ideal(format: Format) -> Format:
    """Return ``format`` with scales that are not rounded: each block's largest value becomes the element's largest."""
    if format.scale is not None:
        return replace(
            format,
            name=f"{format.name}, ideal scales",
            scale=FP32,
            scale_rule="nearest",
            tensor_scale="none",
            static_scale=None,
            four_over_six=False,
        )
    if format.tensor_scale == "static":
        return replace(format, tensor_scale="row", static_scale=None)
    return format


def measure(x: Tensor, format: Format, above: Tensor | None = None) -> Sums:
    """Return what rounding ``x`` (…, columns) to ``format`` does to it.

    ``format`` rotates nothing: ``x`` is rotated already. ``above``: the tensor scale, where ``x`` is a part of what
    shares one, as ``arithmetic.scale_of`` returns it.

    The squared error is split by what would have to change for it to vanish. Under ideal scales (amax / largest
    element, not rounded) there is an error e₀: what of Σe₀² is of values that become zero is the ``deadzone``'s, the
    rest the ``grid``'s. What the real scales add to it, Σ(e² − e₀²), is due to ``clipping`` for values beyond the
    largest that their block can hold, and to the ``scale``'s rounding for all others; that part is negative where a
    rounded scale happens to fit better than the ideal one.

    Of values that are not all finite nothing is measured: ``x2`` is NaN then.
    """
    x = x.reshape(-1, x.shape[-1]).float().contiguous()
    blocks = _by_block(x.abs(), format)
    peak = blocks.amax().item() if blocks.numel() else 0.0
    if not math.isfinite(peak):
        return Sums(count=x.numel(), x2=math.nan)
    rounded = format.fake_quantize(x) if above is None else under.fake_quantize(x, above, format.without_number)
    saturated = format.saturates(x) if above is None else under.saturates(x, above, format.without_number)
    best = ideal(format)
    error, without = rounded - x, rounded if best is format else best.fake_quantize(x)
    of_ideal = error if best is format else without - x
    nonzero = int(x.count_nonzero())
    e2, ideal_e2, dead = _energy(error), _energy(of_ideal), _energy(x * (without == 0))
    clipped = int(saturated.count_nonzero())
    clipping = _energy(error[saturated]) - _energy(of_ideal[saturated]) if clipped else 0.0
    x1, x2, x3, x4 = _moments(x, peak)
    return Sums(
        count=x.numel(),
        x1=x1,
        x2=x2,
        x3=x3,
        x4=x4,
        absolute=torch.linalg.vector_norm(x, 1).item(),
        e1=torch.linalg.vector_norm(error, 1).item(),
        e2=e2,
        ratio=torch.linalg.vector_norm(error / (x if nonzero == x.numel() else torch.where(x == 0, 1, x)), 1).item(),
        zeroed=nonzero - int(rounded.count_nonzero()),
        clipped=clipped,
        blocks=blocks.numel(),
        clipped_blocks=int(_by_block(saturated.to(torch.uint8), format).count_nonzero()) if clipped else 0,
        scale=e2 - ideal_e2 - clipping,
        clipping=clipping,
        deadzone=dead,
        grid=ideal_e2 - dead,
        peak=peak,
        tops=_histogram(blocks),
    )


def _energy(x: Tensor) -> float:
    """Return Σx² of float32 numbers."""
    flat = x.reshape(-1)
    return torch.dot(flat, flat).item()


def _moments(x: Tensor, peak: float) -> list[float]:
    """Return Σx, Σx², Σx³, Σx⁴ of numbers whose fourth power may exceed float32."""
    unit = 2.0 ** math.frexp(peak)[1] if peak else 1.0
    small = (x / unit).reshape(-1)
    square = small * small
    parts = (small.sum(), square.sum(), torch.dot(square, small), torch.dot(square, square))
    return [part.item() * unit**power for power, part in enumerate(parts, start=1)]


def _by_block(values: Tensor, format: Format) -> Tensor:
    """Return the largest of ``values`` (rows, columns) in each block, or in each row where there are no blocks."""
    blocks = values if format.scale is None else arithmetic.split(values, format)
    return blocks.amax(-1).flatten() if blocks.numel() else blocks.new_zeros(0)


def _histogram(tops: Tensor) -> Counter[int]:
    """Return how many numbers are in each bin of the logarithm."""
    nonzero = tops[tops > 0]
    if not nonzero.numel():
        return Counter({_ZERO: tops.numel()}) if tops.numel() else Counter()
    places = (nonzero.log2() * _BINS).floor().to(torch.int64)
    first = int(places.amin())
    counts = (places - first).bincount()
    found = {first + at: count for at, count in enumerate(counts.tolist()) if count}
    zeros = tops.numel() - nonzero.numel()
    return Counter({_ZERO: zeros, **found} if zeros else found)


@cache
def reference(format: Format) -> Sums:
    """Return what rounding does to standard normal values, always the same: what is normal for the format."""
    return measure(gaussian(), format)
