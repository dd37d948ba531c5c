"""TRL's trainers, which give a model a fused head (seen in TRL 1.16). Importing this module makes them refuse."""

from typing import Any

from trl.trainer import utils

from qsurgeon.hf.heads import refuse_wrapped_head
from qsurgeon.patching import Method, patch


def _refusing(add: Method) -> Method:
    def add_fused_lm_head(model: Any, *args: Any, **kwargs: Any) -> None:
        refuse_wrapped_head(model, "the fused head of TRL's trainers")
        add(model, *args, **kwargs)

    return add_fused_lm_head


patch(utils, "add_fused_lm_head", _refusing)
