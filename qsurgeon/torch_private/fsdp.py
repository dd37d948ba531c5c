"""What is private in FSDP's first version, apart because importing it takes time; as seen in torch 2.13."""

from torch.distributed.fsdp._flat_param import FlatParamHandle

__all__ = ["CHECK_TO_FLATTEN", "FlatParamHandle"]

CHECK_TO_FLATTEN = "_validate_tensors_to_flatten"  # the method that refuses tensors that cannot be flattened
