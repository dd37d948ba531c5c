"""What can be wrapped: a registry of kinds of modules, which the rest of qsurgeon asks instead of naming a class.

A kind joins the class of a plain module with the classes of its wrapped layers. A new kind is one file beside this one,
and its name in the list in ``__init__``.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from qsurgeon.errors import SurgeryError
from qsurgeon.layers.layer import QuantLayer, Weight
from qsurgeon.layers.packed import PackedLayer
from qsurgeon.layers.quantization import Quantization


@dataclass(frozen=True)
class Kind:
    """A kind of module that can be wrapped.

    name: what recipes call it in ``types``. layer: what it becomes. packed: what it becomes where weights are packed;
    None for a kind that has no such layer.
    """

    name: str
    layer: type[QuantLayer]
    packed: type[PackedLayer] | None = None

    @property
    def source(self) -> type[nn.Module]:
        """The class of the plain module."""
        return self.layer.source

    @property
    def source_name(self) -> str:
        """What users call that class."""
        return self.layer.source_name()

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What can be rounded in it, in the order in which it is listed."""
        return self.layer.weights

    @cached_property
    def _argument(self) -> str:
        parameters = list(inspect.signature(self.source.forward).parameters)
        return parameters[1]  # after self

    def input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the input, (…, inputs), of a call of the module with ``args`` and ``kwargs``."""
        found: Tensor = args[0] if args else kwargs[self._argument]
        return found

    def holds(self, module: nn.Module) -> bool:
        """Return whether ``module`` is of this kind, plain or wrapped.

        A subclass of the plain class has a forward of its own. One of a wrapped class is what FSDP2 makes of a layer.
        """
        return type(module) is self.source or isinstance(module, self.layer)

    def of(self, module: nn.Module) -> "Kind":
        """Return the kind of a module that this one holds: this one, unless its classes differ in their weights."""
        return self

    def check(self, module: nn.Module, hows: Mapping[str, Quantization], *, packs: bool) -> None:
        """Do nothing if ``module`` can be wrapped, so that its weights compute as ``hows`` say, by their names.

        Raises: SurgeryError, FormatError, ShapeError as the layer's ``check_all``.
        """
        self._target(packs).check_all(module, hows)

    def wrap(self, module: nn.Module, hows: Mapping[str, Quantization], name: str = "", *, packs: bool = False) -> None:
        """Turn ``module`` itself into the layer of its kind, with packed weights if ``packs``. Raises: as ``check``."""
        self._target(packs).take(module, hows, name)

    def entry(self, module: str, weight: str) -> str:
        """Return what one weight of a module is called in plans and records: as the module, if it has no other."""
        return module if len(self.weights) == 1 else f"{module}.{weight}"

    def _target(self, packs: bool) -> type[QuantLayer]:
        if not packs:
            return self.layer
        if self.packed is None:
            raise SurgeryError(f"the weights of a {self.name} cannot be packed; use storage: master")
        return self.packed


DEFAULT = "Linear"  # what a rule that names no types takes
KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Make ``kind`` known under its name, and return it."""
    KINDS[kind.name] = kind
    return kind


def kind_of(module: nn.Module) -> Kind | None:
    """Return the kind of a module, plain or wrapped; None for one that cannot be wrapped."""
    return next((kind.of(module) for kind in KINDS.values() if kind.holds(module)), None)


def kind_in(layer: QuantLayer) -> Kind:
    """Return the kind of a wrapped layer."""
    kind = kind_of(layer)
    assert kind is not None
    return kind


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return which kinds are among ``names``, each once, in the order of the registry."""
    there = set(names)
    return tuple(name for name in KINDS if name in there)


def listed(kinds: Iterable[str], word: str = "or") -> str:
    """Return names as a part of a sentence: "a, b or c". For none it is the kind that is looked for by default."""
    *most, last = tuple(kinds) or (DEFAULT,)
    return f"{', '.join(most)} {word} {last}" if most else last
