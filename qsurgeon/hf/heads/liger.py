"""Liger's fused loss, as transformers' Trainer sets it up. Importing this module makes it refuse a wrapped head."""

from typing import Any

from transformers.integrations import liger

from qsurgeon.hf.heads import refuse_wrapped_head
from qsurgeon.patching import Method, patch_function


def _refusing(apply: Method) -> Method:
    def apply_liger_kernel(model: Any, kernel_config: Any) -> None:
        if (kernel_config or {}).get("fused_linear_cross_entropy", True):
            refuse_wrapped_head(model, "Liger's fused_linear_cross_entropy")
        apply(model, kernel_config)

    return apply_liger_kernel


patch_function(liger, "apply_liger_kernel", _refusing)
