"""Which formats are tried on each module: those that the recipe gives it, and others in their place."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qsurgeon.errors import FormatError
from qsurgeon.formats import Format
from qsurgeon.layers import AS_IT_IS, Quantization
from qsurgeon.surgery import Plan, Step

RECIPE = "recipe"  # the name of what the recipe itself gives to each module


@dataclass(frozen=True)
class Choice:
    """The formats of a module's weight and input; None leaves that as it is."""

    weight: Format | None
    input: Format | None

    @property
    def bits(self) -> float | None:
        """Bits per value of the weight; None where it stays as it is."""
        return None if self.weight is None else self.weight.bits

    @property
    def label(self) -> str:
        """The formats as tables show them: one name where both operands have it, else weight/input."""
        names = [AS_IT_IS if one is None else one.name for one in (self.weight, self.input)]
        return names[0] if names[0] == names[1] else "/".join(names)

    def of(self, how: Quantization, *, weight: bool = True, input: bool = True) -> Quantization:
        """Return ``how`` with these formats; of an operand that is not asked for, only its rotation stays."""
        return Quantization(
            self.weight if weight else None, self.input if input else None, how.behavior, how.rule, phases="both"
        )


def measurable(format: Format | None) -> Format | None:
    """Return ``format`` as it can be measured before any calibration: a static scale without a number is a tensor's."""
    if format is None or format.tensor_scale != "static" or format.static_scale is not None:
        return format
    return replace(format, tensor_scale="tensor")


def choices_of(plan: Plan, formats: Sequence[Format]) -> dict[str, dict[str, Choice]]:
    """Return what is tried, by its name, on each module that ``plan`` wraps, by the module's name.

    First what the recipe says; then each of ``formats``, for the operands that the recipe rounds.

    Raises: FormatError for a format that cannot be in another's place.
    """
    return {step.module.name: _choices(step, formats) for step in plan.wrapped}


def _choices(step: Step, formats: Sequence[Format]) -> dict[str, Choice]:
    how = step.quantization
    assert how is not None
    found = {RECIPE: Choice(measurable(how.weight), measurable(how.input))}
    for format in formats:
        one = measurable(format)
        try:
            choice = Choice(one if how.weight else None, one if how.input else None)
            rounded = choice.of(how)
        except FormatError as error:
            raise FormatError(f"--formats {format.name}: {error}") from error
        rotation = rounded.rotation
        if rotation is not None and step.module.row_shape[-1] % rotation.size:
            raise FormatError(
                f"--formats {format.name}: it rotates {rotation.size} values at a time, which does not divide the "
                f"{step.module.row_shape[-1]} inputs of {step.module.name}"
            )
        found[format.name] = choice
    return found
