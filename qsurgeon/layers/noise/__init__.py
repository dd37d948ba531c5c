"""Noise on the weights of norms while a model is trained: AQN, and RIN with a multiplier for each norm.

Whether there is noise, and that of which step, follows the work as a phase does (``layers/phases/``): into threads,
tasks, compiled code, and what gradient checkpointing computes again.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from qsurgeon.errors import UsageError
from qsurgeon.layers.noise.norm import NoiseOf, NoisyNorm, add_noise, draw, noisy_norms, refused
from qsurgeon.layers.noise.schedule import Moment, Noise, Schedule, Strength
from qsurgeon.layers.phases import During, is_noisy, moment_of, with_noises

__all__ = [
    "Moment",
    "Noise",
    "NoiseOf",
    "NoisyNorm",
    "Schedule",
    "Strength",
    "add_noise",
    "moment_of",
    "noise",
    "noisy_norms",
    "refused",
    "sigma_now",
]


def noise(*models: nn.Module, step: int, steps: int | None = None, epochs: int | None = None) -> During:
    """Let ``models`` have the noise of a step of training inside the block, as their recipes say.

    Outside of such a block there is none: an evaluation is exact. ``step``: counted from 0. ``steps``: how many there
    are in all, which every schedule but a constant one needs; ``epochs``: the same, for one that begins with each
    epoch. The same step has the same noise in all processes and in a resumed run; micro-batches of one step share it.

    It reaches as far as ``phase`` does. A recipe that says ``during: rollout`` has noise where the phase is rollout,
    as in ``generate``. Inside ``disabled`` there is none.

    Raises: UsageError for a model without noise, and for a step that there is not, or a schedule that needs more.
    """
    moment = Moment(step, steps, epochs)
    found = [noisy_norms(model) for model in models]
    for model, norms in zip(models, found, strict=True):
        if not norms:
            raise UsageError(
                f"no norm of {type(model).__name__} has noise: apply a recipe with a noise section, or leave out "
                "qsurgeon.noise"
            )
        for one in norms.values():
            one.noise.sigma(moment)

    def choose() -> Iterator[tuple[Sequence[nn.Module], Moment, bool]]:
        for norms in found:
            draw(norms, moment)
            on = [one for one in norms.values() if one.noise.sigma(moment)]
            yield on, moment, True
            yield [one for one in norms.values() if one not in on], moment, False

    return with_noises(choose)


def sigma_now(norm: NoisyNorm) -> float:
    """Return the standard deviation of the noise that ``norm`` would have if it were called now; 0 for none."""
    moment = moment_of(norm)
    return norm.noise.sigma(moment) if moment is not None and is_noisy(norm, norm.noise.strength.during) else 0.0
