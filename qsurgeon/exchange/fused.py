"""Linear layers that an engine joins into one, because they multiply the same input: they must agree on their scales.

vLLM and SGLang take the largest tensor scale of the parts for all of them, and only warn.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

Value = TypeVar("Value")
# By the last part of their names: attention, gated MLPs, and DeepSeek's latent attention.
TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
_PLACE = {name: names for names in TOGETHER for name in names}


def groups(names: Iterable[str]) -> list[list[str]]:
    """Return which of the modules ``names`` are joined, each group of two or more."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        if last in _PLACE:
            found.setdefault((parent, _PLACE[last]), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def disagreeing(values: Mapping[str, Value]) -> list[Sequence[str]]:
    """Return the groups of the modules in ``values`` whose values are not the same."""
    return [names for names in groups(values) if len({values[name] for name in names}) > 1]
