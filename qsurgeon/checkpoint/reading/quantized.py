"""Weights that another tool quantized, recognized by their dtype and the tensors beside them."""

from collections.abc import Mapping

from qsurgeon.checkpoint.reading.headers import FLOATS, Tensor
from qsurgeon.errors import CheckpointError

NO_NUMBERS_OF_WEIGHTS = {"BOOL", "C64"}

# What lies beside a quantized weight, or in its place, and who leaves it: the first that is there tells. {weight} is
# the weight's full name, {module} its module's.
_MARKS = {
    "{weight}_scale_inv": "as DeepSeek's FP8 models are",
    "{module}.qweight": "by GPTQ or AWQ",
    "{weight}_packed": "by compressed-tensors",
    "{weight}_blocks": "to MXFP4, as gpt-oss is",
    "{weight}.absmax": "by bitsandbytes",
    "{module}.SCB": "by bitsandbytes",
    "{weight}_scale_2": "by ModelOpt",
    "{weight}_scale": "by compressed-tensors or ModelOpt",
}


def refuse_quantized_weight(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Do nothing if the weight ``name`` can be quantized, or if neither it nor anything in its place is there.

    ``tensors``: all of the checkpoint's, by name. Raises: CheckpointError for a weight that is not F16, BF16, F32 or
    F64, or that was replaced by something packed, naming who did it where that can be told.
    """
    tensor = tensors.get(name)
    if tensor is not None and tensor.dtype in FLOATS:
        return
    expected = f"expected a weight in full precision: {', '.join(FLOATS)}"
    mark, how = _mark(name, tensors)
    if tensor is None:
        if mark is not None:
            raise CheckpointError(
                f"{mark.file}: has {mark.name} in place of {name}: it is quantized already, {how}; {expected}"
            )
        return
    if tensor.dtype in NO_NUMBERS_OF_WEIGHTS:
        raise CheckpointError(f"{tensor.file}: {name} is {tensor.dtype}; {expected}")
    by = "" if mark is None else f" {how} ({mark.name} is beside it)"
    raise CheckpointError(f"{tensor.file}: {name} is {tensor.dtype}, quantized already{by}; {expected}")


def _mark(name: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, str]:
    """Return the first of the marks that is there, and what it means."""
    module = name.rpartition(".")[0]
    for pattern, how in _MARKS.items():
        found = tensors.get(pattern.format(weight=name, module=module))
        if found is not None:
            return found, how
    return None, ""
