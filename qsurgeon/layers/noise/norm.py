"""A norm whose weight gets noise in the forward pass: y = (w + z) · x̂ in FP32, and the weight stays as it is.

Nothing is written into a parameter or a buffer: a state dict has no noise, there is nothing to restore, and noise that
is smaller than a step of bfloat16 is not lost. What counts as a norm is found out by calling it (``refused``).
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from qsurgeon.errors import SurgeryError
from qsurgeon.layers.noise.normal import key_of, normals
from qsurgeon.layers.noise.schedule import Moment, Strength
from qsurgeon.layers.phases import is_enabled, is_noisy, moment_of
from qsurgeon.telling import say

_SEEN = 4096  # values that a norm is tried with, at least
_SMALL = 1.5 * 2.0**-9  # a change of a weight of 1 that bfloat16 would round away
_CLOSE = 1e-3
_told: set[str] = set()  # what the user was told already
_FAILS = (ArithmeticError, AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


class Drawn(NamedTuple):
    """The noise of one norm at one moment, float32, (features,)."""

    moment: Moment
    values: Tensor


class NoiseOf:
    """What a norm knows of its noise: how strong it is, and what it is at the moment that was drawn last."""

    def __init__(self, strength: Strength, multiplier: float, name: str, features: int) -> None:
        self.strength, self.multiplier, self.name, self.features = strength, multiplier, name, features
        self.drawn: Drawn | None = None

    def sigma(self, moment: Moment) -> float:
        """Return the standard deviation at ``moment``. Raises: UsageError as ``Strength.sigma``."""
        return self.multiplier * self.strength.sigma(moment)

    @property
    def last(self) -> float | None:
        """The standard deviation at the moment that was named last; None before the first."""
        return None if self.drawn is None else self.sigma(self.drawn.moment)


class NoisyNorm(nn.Module):
    """A norm that was given noise in place; a class of its own for each class of norms, which it is a subclass of.

    source: the class that it was.
    """

    source: ClassVar[type[nn.Module]]
    noise: NoiseOf
    weight: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the norm does, with noise inside ``qsurgeon.noise``."""
        noise = self.noise
        if not is_noisy(self, noise.strength.during):
            if not torch.compiler.is_compiling() and torch.is_grad_enabled() and self.training:
                _tell_if_forgotten(self)
            return self.source.forward(self, *args, **kwargs)
        return _noisy(self.source.forward, self, _values(self, noise), args, kwargs)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of the norm."""
        return ", ".join(filter(None, (super().extra_repr(), f"noise=×{self.noise.multiplier:g}")))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be copied and pickled by the class that the norm was: this one is made anew wherever it is needed."""
        made: Any = super().__reduce_ex__(protocol)
        return _new, (self.source,), *made[2:]


def _new(source: Any) -> NoisyNorm:
    kind = _class(source)
    return kind.__new__(kind)


@cache
def _class(source: Any) -> type[NoisyNorm]:
    return type(f"Noisy{source.__name__}", (NoisyNorm, source), {"source": source, "__doc__": NoisyNorm.__doc__})


class _View:
    """A norm with other values for its weight and bias; all else is the norm's own."""

    def __init__(self, norm: nn.Module, weight: Tensor) -> None:
        self.norm, self.weight = norm, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.norm, name)


def _tell_if_forgotten(norm: NoisyNorm) -> None:
    """Tell the user once of a model that is trained without its noise, because nobody names the steps."""
    if "telling" in _told or moment_of(norm) is not None or not is_enabled(norm):
        return
    _told.add("telling")
    say(
        f"{norm.noise.name} is trained and has no noise: its recipe says {norm.noise.strength}, and no step was named. "
        "Put each step inside of: with qsurgeon.noise(model, step=…, steps=…). transformers' Trainer does it itself"
    )


def _values(norm: NoisyNorm, noise: NoiseOf) -> Tensor:
    """Return the noise of this moment, on the device of the norm."""
    drawn, device = noise.drawn, norm.weight.device
    if not torch.compiler.is_compiling():
        moment = moment_of(norm)
        if moment is not None and (drawn is None or drawn.moment != moment):
            # Another step has begun meanwhile: gradient checkpointing computes again, or a thread is behind.
            drawn = Drawn(moment, _draw([noise], moment)[0])
        if drawn is not None and drawn.values.device != device:
            drawn = Drawn(drawn.moment, drawn.values.to(device))
            noise.drawn = drawn if noise.drawn is None or noise.drawn.moment == drawn.moment else noise.drawn
    assert drawn is not None
    return drawn.values if drawn.values.device == device else drawn.values.to(device)


def _noisy(
    forward: Callable[..., Any], norm: Any, values: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Return ``forward`` of a norm, whose weight has ``values`` added, in the dtype that it has without.

    It computes in FP32 from beginning to end and is rounded once: a normalized input that was rounded before would
    be a number whose product with a weight such as 1 rounds back to itself, and small noise would be lost.
    """
    x: Any = args[0] if args else next(iter(kwargs.values()))
    view: Any = _View(norm, norm.weight.float() + values)
    bias = getattr(norm, "bias", None)
    if bias is not None:
        view.bias = bias.float()
    y = forward(view, *map(_float, args), **{name: _float(one) for name, one in kwargs.items()})
    return y.to(_dtype(forward, norm, x))


def _dtype(forward: Callable[..., Any], norm: Any, x: Tensor) -> torch.dtype:
    """Return the dtype of the norm's output without noise, for an input like ``x``."""
    if x.dtype == norm.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    found: torch.dtype = forward(norm, x.new_empty((0, x.shape[-1]))).dtype
    return found


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def add_noise(norm: nn.Module, strength: Strength, multiplier: float, name: str) -> None:
    """Turn ``norm`` itself into one with noise; the module object and its parameters stay the same.

    name: in the plain model; the noise depends on it. Raises: SurgeryError if ``refused`` has a reason.
    """
    why = refused(norm)
    if why is not None:
        raise SurgeryError(f"{name} cannot have noise: {why}")
    source: Any = type(norm)
    norm.__class__ = _class(source)
    vars(norm)["noise"] = NoiseOf(strength, multiplier, name, norm.get_parameter("weight").numel())
    if hasattr(norm, "_hf_hook"):
        # accelerate's hook calls the forward it found when it was attached.
        vars(norm)["_old_forward"] = type(norm).forward.__get__(norm)


def noisy_norms(model: nn.Module) -> dict[str, NoisyNorm]:
    """Return the norms of ``model`` that have noise, by their paths in it."""
    return {path: module for path, module in model.named_modules() if isinstance(module, NoisyNorm)}


def draw(norms: Mapping[str, NoisyNorm], moment: Moment) -> None:
    """Let ``norms`` have the noise of ``moment``. Raises: UsageError as ``Strength.sigma``."""
    todo = [one.noise for one in norms.values() if one.noise.drawn is None or one.noise.drawn.moment != moment]
    if todo:
        devices = [None if one.drawn is None else one.drawn.values.device for one in todo]
        for one, device, values in zip(todo, devices, _draw(todo, moment), strict=True):
            # Another tensor, and not the same with other values: a backward pass may still need those.
            one.drawn = Drawn(moment, values if device is None else values.to(device))


def _draw(noises: list[NoiseOf], moment: Moment) -> list[Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        keys = [key_of(one.strength.seed, moment.step, one.name) for one in noises]
        found = normals(keys, [one.features for one in noises])
        return [values * one.sigma(moment) for one, values in zip(noises, found, strict=True)]


# --- what is a norm


def refused(module: nn.Module) -> str | None:
    """Return why noise cannot act on ``module``; None for a norm.

    That is a module with a weight of one dimension, whose output is that weight (or it and a constant) times its input
    divided by the input's deviation. It is tried with tensors of its own size, on the CPU, and nothing of it changes.
    """
    if isinstance(module, NoisyNorm):
        return "it has noise already"
    own = dict(module.named_parameters())
    weight = own.get("weight")
    if weight is None:
        return "it has no weight"
    if weight.dim() != 1 or own.keys() - {"weight", "bias"}:
        return f"it is a {type(module).__name__}, whose weight is no factor for each feature"
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        return "its forward was replaced on the instance, so that noise would have no effect"
    if not weight.dtype.is_floating_point or weight.dtype == torch.float64:
        return f"its weight is {weight.dtype}; expected float32, bfloat16 or float16"
    return None if _scales(module, weight.numel()) else f"a {type(module).__name__} does not scale what it normalizes"


def _scales(module: nn.Module, features: int) -> bool:
    """Return whether a change of the weight changes the output by as much, times the normalized input.

    In bfloat16 too, where a change that is smaller than a step has to be seen in the mean of many outputs.
    """
    with torch.no_grad(), torch.device("cpu"):
        x, weight, change = _examples(features)
        nothing, one = torch.zeros(features), torch.ones(features)
        try:
            plain, unit, moved = (_tried(module, weight, by, x) for by in (nothing, one, change))
            half, little = (_tried(module, one.bfloat16(), by, x.bfloat16()) for by in (nothing, one * _SMALL))
        except _FAILS:
            return False
        unit, moved, little = unit - plain, moved - plain, little.float() - half.float()
        is_normal = (unit.square().mean(-1).sqrt() - 1).abs().max() < _CLOSE
        is_exact = (moved - unit * change).abs().max() < _CLOSE
        seen = (little * unit).sum() / unit.square().sum()
        return bool(is_normal and is_exact and abs(seen - _SMALL) < _SMALL / 4 and half.dtype == torch.bfloat16)


def _examples(features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs (rows, features), a weight and a change of it."""
    rows = -(-_SEEN // features)
    with torch.inference_mode(False):
        x, weight, change = normals([(1, 2), (3, 4), (5, 6)], [rows * features, features, features])
    return 3 * x.reshape(rows, features), 1 + weight / 4, change


def _tried(module: nn.Module, weight: Tensor, change: Tensor, x: Tensor) -> Tensor:
    view: Any = _View(module, weight)
    view.bias = None if getattr(module, "bias", None) is None else torch.zeros_like(weight)
    y: Any = _noisy(type(module).forward, view, change, (x,), {})
    if not isinstance(y, Tensor) or y.shape != x.shape:
        raise TypeError("not a tensor like the input")
    return y
