"""What a checkpoint can be exported to: a target knows how each weight is stored there, and what the config says."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from qsurgeon.errors import ExchangeError
from qsurgeon.exchange.grids import input_grid, weight_grid
from qsurgeon.exchange.source import Wrapped
from qsurgeon.storage import Encoding


@dataclass(frozen=True)
class Scheme:
    """What one weight becomes.

    weight, input: the grids that the target's config names, see ``grids``; no input: it stays as it is. encoding: how
    the weight is stored. beside: tensors that are stored beside it, by their names in the module.
    """

    weight: str
    input: str
    encoding: Encoding
    beside: Mapping[str, Tensor]


@dataclass(frozen=True)
class Exported:
    """A wrapped weight, and what it becomes."""

    source: Wrapped
    scheme: Scheme


class Target(ABC):
    """A kind of checkpoint that others read.

    pairs: which inputs it has a scheme for, by the weight's grid; what is not here is refused.
    """

    name: ClassVar[str]
    pairs: ClassVar[Mapping[str, Sequence[str]]]

    @abstractmethod
    def scheme(self, one: Wrapped, *, weight_only: bool) -> Scheme:
        """Return what a wrapped weight becomes; ``weight_only``: with an input that stays as it is.

        Raises: ExchangeError for one that the target cannot hold.
        """

    @abstractmethod
    def files(self, config: dict[str, Any], exported: Sequence[Exported], plain: Sequence[str]) -> dict[str, Any]:
        """Return the JSON files that describe the weights, by name: ``config.json``, made of ``config``, and others.

        plain: the names of the Linear modules that are not wrapped.
        """

    def exact(self, one: Wrapped, scheme: Scheme, divisors: Mapping[str, float]) -> Scheme:
        """Return ``scheme`` with the ``divisors`` that an import read, by tensor, where the scales are still theirs."""
        return scheme

    def grids(self, one: Wrapped, *, weight_only: bool) -> tuple[str, str]:
        """Return the grids of a wrapped weight and of its input. Raises: ExchangeError for what has no scheme."""
        how, where = one.how, one.module.name
        if one.module.type != "Linear":
            raise ExchangeError(
                f"{where} is a {one.module.type or one.module.kind}; {self.name} has Linear modules only"
            )
        if how.weight is None:
            raise ExchangeError(f"{where} rounds its input alone, to {how.input_name}; {self.name} has no such scheme")
        weight = weight_grid(how.weight)
        if weight not in self.pairs:
            why = "rotates, which its readers would have to do" if how.weight.hadamard else "is none that it has"
            raise ExchangeError(
                f"{where}: the weight's format '{how.weight.name}' {why}; {self.name} has: {', '.join(self.pairs)}. "
                "Export the values of the weights: --to dense"
            )
        width, columns = how.weight.block_shape[1], one.module.row_shape[-1]
        if width and columns % width:
            raise ExchangeError(
                f"{where}: its {columns} inputs are not whole blocks of {width}, which readers of {self.name} expect"
            )
        if weight_only or how.input is None:
            return self._weight_only(weight, where), ""
        asked = input_grid(how.input)
        if asked not in self.pairs[weight]:
            known = [f"'{one}'" for one in self.pairs[weight] if one]
            raise ExchangeError(
                f"{where}: {self.name} has no scheme for weights in {weight} with inputs in '{how.input.name}'"
                f"{f' ({asked})' if asked else ''}; {_instead(known)}{_static(asked, self.pairs[weight])}"
            )
        return weight, asked

    def _weight_only(self, weight: str, where: str) -> str:
        if "" not in self.pairs[weight]:
            raise ExchangeError(f"{where}: {self.name} has no weight-only scheme for {weight}")
        return weight


def _instead(known: Sequence[str]) -> str:
    weights = "export the weights alone: --weight-only"
    return f"it has inputs in {' or '.join(known)}. Or {weights}" if known else weights[:1].upper() + weights[1:]


def _static(asked: str, known: Sequence[str]) -> str:
    """Return the advice for an input whose scale an engine must know before it sees a token."""
    family = asked.partition(",")[0]
    if f"{family}, a static scale" not in known:
        return ""
    return (
        ". For a static scale say `tensor_scale: static` in the recipe's format, and let qsurgeon.calibrate(model, "
        "batches) find its number, best before training"
    )
