"""Refuses a wrapped output head to libraries that read its weight themselves and never call it.

A fused loss saves the memory of the logits: it takes the weight and computes past the layer. That can be seen where a
library sets its loss up, and no later: under FSDP it is handed a tensor that it gathered. Each module below is imported
right after the library's.
"""

import sys
from typing import Any

from qsurgeon.errors import SurgeryError
from qsurgeon.layers import PackedLayer, QuantLayer
from qsurgeon.patching import Method


def refuse_wrapped_head(model: Any, who: str, *, rollouts: bool = False) -> None:
    """Do nothing if the output head of ``model`` may be computed past: it is not wrapped, or not while it trains.

    rollouts: ``who`` computes past the head while the model generates, too.

    Raises: SurgeryError, which says that ``who`` would.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    held = head.get_base_layer() if tuners is not None and isinstance(head, tuners.BaseTunerLayer) else head
    if not isinstance(held, QuantLayer):
        return
    if not rollouts and all(how.behavior.phases == "rollout" for how in held.quantizations.values()):
        return
    path = next(path for path, module in model.named_modules() if module is head)
    how = "take its packed codes for values" if isinstance(held, PackedLayer) else "train it in full precision"
    raise SurgeryError(
        f"{path}, the output head of {type(model).__name__}, is wrapped, and {who} multiplies with its weight itself "
        f"and never calls it: it would {how}. Exclude the head in the recipe: 'exclude: [{path}]'"
    )


def refusing_trainer(init: Method) -> Method:
    """Return the ``init`` of a trainer that refuses a student or a teacher whose output head is wrapped."""

    def init_and_refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        for model in (self.model, getattr(self, "teacher_model", None)):
            if model is not None:
                refuse_wrapped_head(self.accelerator.unwrap_model(model), f"the loss of TRL's {type(self).__name__}")

    return init_and_refuse
