"""Who asks packed codes what dtype they have: what keeps parameters is told of the bytes, all else of the values.

Code asks a weight for its dtype to compute in it: ``x.to(layer.weight.dtype)``, ``next(module.parameters()).dtype``.
That of the codes, uint8, would make numbers whole that are not, mostly in silence. Libraries that save, load, place
and shard parameters ask for it too, and have to get the dtype of the bytes that they handle. So does code that names
uint8 itself, to tell codes from other parameters. Who asks is the only difference.
"""

import sys
from functools import lru_cache
from types import FrameType

import torch
from torch import nn

# Packages that keep parameters.
_KEEPERS = (
    "accelerate", "deepspeed", "huggingface_hub", "lightning", "lightning_fabric", "peft", "pytorch_lightning",
    "qsurgeon", "safetensors", "torch", "transformers",
)  # fmt: skip
# Of those, the code of modules, and what answers for a whole model (transformers 5.23, peft 0.21); and what asks a
# weight of ours as they do, to learn what they are told.
_MODEL_DTYPE = "transformers.modeling_utils.ModuleUtilsMixin.dtype"
_MODULES = ("peft.tuners", "transformers.models", _MODEL_DTYPE, "qsurgeon.surgery.reader")


def asks_of_values(above: int) -> bool:
    """Return whether the code that is ``above`` calls up asks of the values of a weight, not of its bytes."""
    if torch.compiler.is_dynamo_compiling():  # what is traced computes, and has no frames
        return True
    frame = sys._getframe(above + 1)
    if _is_under(_place(frame), _MODULES):
        return True
    return not _is_under(_place(frame), _KEEPERS) and not _looks_for_bytes(frame)


def asks_of_model(above: int) -> bool:
    """Return whether the code that is ``above`` calls up looks for the dtype of a whole model."""
    return not torch.compiler.is_dynamo_compiling() and _is_under(_place(sys._getframe(above + 1)), (_MODEL_DTYPE,))


def _place(frame: FrameType) -> str:
    return f"{frame.f_globals.get('__name__', '')}.{frame.f_code.co_qualname}"


@lru_cache(maxsize=4096)
def _is_under(place: str, names: tuple[str, ...]) -> bool:
    return any(place.startswith(f"{one}.") for one in names)


def _looks_for_bytes(frame: FrameType) -> bool:
    """Return whether code outside of modules names uint8."""
    code = frame.f_code
    if "uint8" not in code.co_names:
        return False
    return not (code.co_argcount and isinstance(frame.f_locals.get(code.co_varnames[0]), nn.Module))
