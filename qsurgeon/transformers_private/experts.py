"""What transformers' decorator ``use_experts_implementation`` leaves on a class of fused experts and its modules."""

from torch import nn

_FREE = "experts_interface"  # what the decorator's forward closes over, and nothing else in transformers does
_SET = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
PARALLEL = "_is_expert_parallel"  # set on a module that holds a part of the experts
GATE = "_apply_gate"  # the method that makes one value of each gate and up


def is_experts(module: nn.Module) -> bool:
    """Return whether a module is of a decorated class, and its forward is the decorator's, not one of a subclass."""
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and _FREE in code.co_freevars and all(hasattr(module, one) for one in (*_SET, PARALLEL))
