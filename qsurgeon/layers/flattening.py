"""FSDP's first version, which flattens parameters into one. Importing this module makes it refuse codes by name."""

from typing import Any

from qsurgeon.errors import CodesError
from qsurgeon.layers.codes import Codes
from qsurgeon.patching import Method, patch
from qsurgeon.torch_private.fsdp import CHECK_TO_FLATTEN, FlatParamHandle


def _refusing_codes(validate: Method) -> Method:
    def refuse_or_validate(handle: Any, tensors: Any) -> Any:
        codes = next((one for one in tensors if isinstance(one, Codes)), None)
        if codes is not None:
            raise CodesError(
                f"{codes.label or 'the weight of a packed layer'} holds packed codes, and FullyShardedDataParallel "
                "flattens parameters into one of floats. Shard with fully_shard (accelerate's fsdp_version: 2), leave "
                "packed layers out with ignored_states, or use storage: master"
            )
        return validate(handle, tensors)

    return refuse_or_validate


patch(FlatParamHandle, CHECK_TO_FLATTEN, _refusing_codes)
