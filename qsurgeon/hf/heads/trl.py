"""TRL's trainers, which give a model a fused head. Importing this module makes them refuse."""

from typing import Any

from trl.trainer import utils

from qsurgeon.hf.heads import refuse_wrapped_head
from qsurgeon.patching import Method, patch_function

# Functions of trl.trainer.utils that set up a head which is never called: from 1.15 on, and from 1.0 to 1.14.
FUSING = ("add_fused_lm_head", "patch_chunked_lm_head")


def refusing(add: Method) -> Method:
    """Return an ``add`` that refuses a model whose output head is wrapped."""

    def add_fused_lm_head(model: Any, *args: Any, **kwargs: Any) -> None:
        cast = bool(kwargs.get("cast_lm_head_to_fp32"))  # the trainer gave the head another forward before
        refuse_wrapped_head(model, "the fused head of TRL's trainers", rollouts=cast)
        add(model, *args, **kwargs)

    return add_fused_lm_head


for _name in FUSING:
    if hasattr(utils, _name):
        patch_function(utils, _name, refusing)
