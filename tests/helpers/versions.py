"""What the libraries of a user can do, where their versions differ: for tests, and the reason why one is left out.

``make test`` runs with constraints.txt; ``make test-oldest`` and the other sets with files of their own.
"""

from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from importlib.metadata import version
from typing import Any

import peft
import pytest
from packaging.version import Version
from transformers.integrations import peft as integration


def at_least(package: str, least: str) -> bool:
    return Version(version(package)) >= Version(least)


def needs(package: str, least: str, why: str) -> pytest.MarkDecorator:
    """Return a mark that leaves a test out where ``package`` is older; ``why`` says what it lacks."""
    return pytest.mark.skipif(
        not at_least(package, least), reason=f"{package} {version(package)} {why}; {least} and later do not"
    )


# The peft that transformers asks for before it puts an adapter on a model itself.
_PEFT_ASKED = integration.MIN_PEFT_VERSION
ADAPTS = at_least("peft", _PEFT_ASKED)
adapts = pytest.mark.skipif(
    not ADAPTS,
    reason=f"transformers {version('transformers')} adapts models with peft {_PEFT_ASKED} and later, this is "
    f"{version('peft')}",
)

_RECOMPUTING = "activation_checkpointing" if at_least("transformers", "5.23") else "gradient_checkpointing"


def recomputing(is_on: bool, **how: Any) -> dict[str, Any]:
    """Return arguments of TrainingArguments and its subclasses: whether to recompute in backward, and how."""
    return {_RECOMPUTING: is_on, **({f"{_RECOMPUTING}_kwargs": how} if how else {})}


def recompute(model: Any, **how: Any) -> None:
    """Let a model of transformers recompute in backward."""
    getattr(model, f"{_RECOMPUTING}_enable")(how)


@dataclass(frozen=True)
class Part:
    """A config of peft inside of another one, not made yet."""

    kind: str
    fields: dict[str, Any]


def part(kind: str, **fields: Any) -> Part:
    return Part(kind, fields)


def adapter_config(kind: str, **fields: Any) -> Any:
    """Return a config of peft; the test is left out where peft has no such kind of adapter, or no such field of it."""
    config = getattr(peft, kind, None)
    absent = [] if config is None else sorted(fields.keys() - {one.name for one in dataclass_fields(config)})
    if config is None or absent:
        pytest.skip(f"peft {peft.__version__} has no {kind}" + (f" with {absent[0]}" if absent else ""))
    values = {
        name: adapter_config(one.kind, **one.fields) if isinstance(one, Part) else one for name, one in fields.items()
    }
    return config(**values)
