"""Records of other versions: one of an older is raised to the present, and each is written as the oldest that says it.

A key that is new needs no version of its own: where a record lacks it, it has the value that all had before it existed,
and where it has that value it is not written. So an older qsurgeon reads what it could have said itself. What changes
the meaning of other keys, or their place, is a new version, with one function for the way up and one for the way down.
"""

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from qsurgeon.errors import CheckpointError
from qsurgeon.version import __version__

Data = dict[str, Any]
PRESENT = 2

# Of a rule and of a format, what qsurgeon 0.1.0 writes always, and asks for: see ``compact``.
RULE = frozenset({"name", "weight", "input", "gradient", "phases", "modules", "excluded"})
FORMAT = frozenset(
    {"element", "block", "scale", "scale_rule", "tensor_scale", "static_scale", "rounding", "hadamard"}
    | {"four_over_six", "seed"}
)


def _up_from_1(data: Data) -> Data:
    """What a backward pass keeps of an input was said once, for all rules."""
    kept, rules = data.pop("saved_inputs", None), data.get("rules")
    for rule in rules if kept is not None and isinstance(rules, list | tuple) else ():  # else the schema refuses it
        if isinstance(rule, dict):
            rule.setdefault("saved_inputs", kept)
    return data


def _down_to_1(data: Data) -> Data | None:
    kept = [rule.pop("saved_inputs", "packed") for rule in data["rules"]]
    if len(set(kept)) > 1:
        return None
    return {**data, "saved_inputs": kept[0] if kept else "packed"}


# By the version that is raised, and by the version that is written.
UP: dict[int, Callable[[Data], Data]] = {1: _up_from_1}
DOWN: dict[int, Callable[[Data], Data | None]] = {1: _down_to_1}


def raised(data: Data) -> Data:
    """Return the present version of a record of any version up to it; what has no version stays as it is.

    Raises: CheckpointError for a version that there is not, or not yet.
    """
    version = data.get("version", PRESENT)
    if type(version) is not int or not 1 <= version <= PRESENT:
        raise CheckpointError(
            f"quantization_config.version is {version!r}; expected a whole number from 1 to {PRESENT}"
            f"{written_by(data.get('qsurgeon_version'))}"
        )
    data = deepcopy(data)
    for older in range(version, PRESENT):
        data = UP[older](data) | {"version": older + 1}
    return data


def lowered(data: Data) -> Data:
    """Return a record of the present version as the oldest version that can say the same."""
    for older in range(PRESENT - 1, 0, -1):
        lower = DOWN[older](deepcopy(data))
        if lower is None:
            break
        data = lower | {"version": older}
    return data


def written_by(writer: Any) -> str:
    """Return the end of a message: which version wrote a record, and what to do, where it is not this one."""
    if not isinstance(writer, str) or writer == __version__:
        return ""
    if _numbers(writer) >= _numbers(__version__):
        return f" (written by qsurgeon {writer}, and this is {__version__}: install qsurgeon {writer} or newer)"
    return f" (written by qsurgeon {writer}, which is older than this one, {__version__}: it was changed since)"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
