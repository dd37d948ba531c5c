"""Report on stderr what is wrapped in a model, under ``qsurgeon run``."""

import os
from typing import Any

from qsurgeon.launch import VARIABLE
from qsurgeon.layers import Quantization, quant_layers
from qsurgeon.surgery import headline_of
from qsurgeon.telling import say

_said: set[str] = set()


def announce(model: Any) -> None:
    """Say how much of a model is wrapped, and by which rules of the recipe.

    Nothing is said outside of ``qsurgeon run``, nor what this process has said before. A model in which nothing is
    wrapped is announced as well, and at once: at the end of a long run it would be too late to know.
    """
    if VARIABLE not in os.environ:
        return
    rank = os.environ.get("RANK")
    # With the process id in it, a forked child does not take for said what its parent said.
    who = f"pid {os.getpid()}" if rank is None else f"pid {os.getpid()} (rank {rank})"
    name = type(model).__name__
    what = headline_of(model)
    wrapped = quant_layers(model).values()
    if wrapped:
        rules = ", ".join(dict.fromkeys(_named(how) for layer in wrapped for how in layer.quantizations.values()))
        line = f"{who}: {name}: {what} (recipe rules: {rules})"
    else:
        origin = getattr(getattr(model, "config", None), "name_or_path", "")
        line = f"{who}: {name}{f' from {origin}' if origin else ''}: {what}"
    if line not in _said:
        _said.add(line)
        say(line)


def _named(how: Quantization) -> str:
    """Return the name of a rule, with what else its forward pass depends on."""
    return f"{how.rule} ({how.when})" if how.when else how.rule
