"""The words by which rules say how a layer uses its formats, and the one value that they come to.

Recipes, records and layers share them. Who asks ``Behavior`` for all of its fields needs no change for a new one: the
recipe's keys, the record, ``print(model)``, reports and model cards. Only the layer that obeys a field reads its name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Gradient = Literal["ste", "clipped", "none"]  # how a gradient passes the rounding
Phase = Literal["training", "rollout"]  # what a model is being called for
Phases = Literal["both", "training", "rollout"]  # in which of them a layer rounds
Backward = Literal["dequantized", "high_precision"]  # what a backward pass multiplies gradients with
Adapters = Literal["apart", "merged"]  # whether an adapter's product is added, or its ΔW before the weight is rounded
SavedInputs = Literal["packed", "full"]  # what a backward pass keeps of an input: codes and scales, or their values
Storage = str  # of a weight: "master", full precision, rounded in each pass, or the name of an encoding of storage/


@dataclass(frozen=True)
class Shown:
    """How a field of ``Behavior`` is shown.

    column: tables have a column for it; another field is told among the reasons, where it differs from its default.
    reason: how it is told there, with ``{}`` for the value; nothing for its name and value. forward: a forward pass
    depends on it. others: what other tools call it.
    """

    column: bool = False
    reason: str = ""
    forward: bool = False
    others: tuple[str, ...] = ()


class Common(BaseModel):
    """Of a ``Behavior``, what a recipe may also say once for all of its rules."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    saved_inputs: Annotated[SavedInputs, Shown(others=("save_inputs", "saved_activations"))] = Field(
        default="packed",
        description="What a backward pass keeps of an input: packed codes, or full values; gradients agree.",
    )


class Behavior(Common):
    """How a layer uses its formats: all that a rule says beside them and the modules that it takes.

    A default is what a checkpoint means that was written before the field existed.
    """

    gradient: Annotated[
        Gradient,
        Shown(column=True, others=("grad", "ste", "gradient_estimator", "gradients", "estimator")),
    ] = Field(default="ste", description="How the gradient passes the rounding.")
    phases: Annotated[Phases, Shown(reason="in {} only", forward=True, others=("when", "modes", "mode"))] = Field(
        default="both", description="When modules round: in training, in rollouts, or in both."
    )
    adapters: Annotated[Adapters, Shown(reason="adapters {}", forward=True, others=("adapter", "lora"))] = Field(
        default="apart",
        description="What LoRA adds to: the product, q(W)·q(x) + ΔW·x, or the weight before rounding, q(W + ΔW)·q(x).",
    )

    backward: Annotated[
        Backward, Shown(reason="backward with {} operands", others=("backward_operands", "bwd", "backward_override"))
    ] = Field(
        default="dequantized",
        description="What the backward pass multiplies with: the rounded operands, or the operands before rounding.",
    )

    @model_validator(mode="after")
    def _has_one_gradient(self) -> Self:
        if self.backward == "high_precision" and self.gradient != "ste":
            raise ValueError(
                f"'backward: high_precision' has the gradient of a product without rounding, and 'gradient: "
                f"{self.gradient}' is of one with it; say 'gradient: ste', or leave 'backward' out"
            )
        return self

    @classmethod
    def of(cls, *sections: BaseModel) -> Self:
        """Return what ``sections`` say: of each field, what the first that sets it says, or the default."""
        said: dict[str, Any] = {}
        for section in reversed(sections):
            said |= {
                field.name: getattr(section, field.name) for field in FIELDS if field.name in section.model_fields_set
            }
        return cls(**said)

    @property
    def fields(self) -> dict[str, Any]:
        """Each field by its name."""
        return {field.name: getattr(self, field.name) for field in FIELDS}

    @property
    def columns(self) -> dict[str, str]:
        """What tables show in columns of their own, by field."""
        return {field.name: str(getattr(self, field.name)) for field in FIELDS if field.shown.column}

    @property
    def differing(self) -> dict[str, Any]:
        """What differs from the defaults, by field."""
        return {field.name: value for field in FIELDS if (value := getattr(self, field.name)) != field.default}

    def reasons(self, *, forward: bool = False) -> tuple[str, ...]:
        """Return what differs from the defaults and has no column, in words; ``forward``: of forward passes alone."""
        return tuple(
            (field.shown.reason or f"{field.name} {{}}").format(self.differing[field.name])
            for field in FIELDS
            if field.name in self.differing and not field.shown.column and (field.shown.forward or not forward)
        )


@dataclass(frozen=True)
class BehaviorField:
    """A field of ``Behavior``, and how it is shown."""

    name: str
    default: Any
    description: str
    shown: Shown


def _fields() -> Iterator[BehaviorField]:
    for name, field in Behavior.model_fields.items():
        shown = next((one for one in field.metadata if isinstance(one, Shown)), Shown())
        yield BehaviorField(name, field.default, field.description or "", shown)


FIELDS = tuple(_fields())
