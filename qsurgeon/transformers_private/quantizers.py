"""transformers' quantizers. Who imports this module imports them, and they import ours: ``qsurgeon/__init__.py``."""

from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer, _assign_is_quantized
from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = [
    "ASKS_OF_EACH_TENSOR",
    "AUTO_QUANTIZER_MAPPING",
    "HfQuantizer",
    "QuantizationConfigMixin",
    "assign_is_quantized",
    "new_dtype",
    "register_quantization_config",
    "register_quantizer",
]

# From 5.21 on a quantizer is asked of each tensor what it is to be cast to, before it is read.
ASKS_OF_EACH_TENSOR = hasattr(HfQuantizer, "get_new_dtype")


def new_dtype(quantizer: HfQuantizer, converter: Any, tensor: Any, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return what transformers casts a tensor to, where it asks a quantizer: see ``ASKS_OF_EACH_TENSOR``."""
    new: torch.dtype | None = HfQuantizer.get_new_dtype(quantizer, converter, tensor, dtype)
    return new


def assign_is_quantized(model: Any) -> None:
    """Mark the configs in ``model`` as transformers marks those of each model that has a quantizer."""
    _assign_is_quantized(model)
