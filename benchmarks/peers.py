"""Other projects on the same work, where they are installed: fake quantization by what they offer for it."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

Act = Callable[[Tensor], Tensor]


def peers(format: str) -> dict[str, Act]:
    """Return what installed peers have for ``format``, by name and version."""
    found: dict[str, Act] = {}
    if importlib.util.find_spec("torchao"):
        found |= _torchao(format)
    if importlib.util.find_spec("compressed_tensors"):
        found |= _compressed_tensors(format)
    return found


def _torchao(format: str) -> dict[str, Act]:
    import torchao
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    def mx(element: torch.dtype) -> Act:
        return lambda x: MXTensor.to_mx(x, element, 32).dequantize(x.dtype)

    def nvfp4(x: Tensor) -> Tensor:
        scale = per_tensor_amax_to_scale(x.abs().max())
        rounded: Tensor = NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(x.dtype)
        return rounded

    acts = {"mxfp4": mx(torch.float4_e2m1fn_x2), "mxfp8": mx(torch.float8_e4m3fn), "nvfp4": nvfp4}
    return {f"torchao {torchao.__version__}": acts[format]} if format in acts else {}


def _compressed_tensors(format: str) -> dict[str, Act]:
    import compressed_tensors
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from compressed_tensors.quantization.utils.mxfp_utils import maybe_convert_from_mx_exp

    if format not in {"mxfp4", "mxfp8", "nvfp4"}:
        return {}
    args = preset_name_to_scheme(format.upper(), ["Linear"]).weights

    def act(x: Tensor) -> Tensor:
        above = generate_gparam(x.min(), x.max()) if format == "nvfp4" else None
        blocks = x.unflatten(-1, (-1, args.group_size))
        scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=above)
        if format != "nvfp4":
            scale = maybe_convert_from_mx_exp(args, scale)
        rounded: Tensor = fake_quantize(x, scale, zero, args, global_scale=above)
        return rounded

    return {f"compressed-tensors {compressed_tensors.__version__}": act}
