"""The named formats: one line each."""

from dataclasses import replace

from qsurgeon.errors import FormatError, nearest
from qsurgeon.formats.block import Format
from qsurgeon.formats.element import E2M1, E2M3, E3M2, E4M3, E5M2, INT4, INT8, INT8_64
from qsurgeon.formats.scale import BF16, E4M3_SCALE, E8M0, FP32

_FORMATS = (
    Format("mxfp4", E2M1, 32, E8M0, "floor"),
    Format("mxfp6_e2m3", E2M3, 32, E8M0, "floor"),
    Format("mxfp6_e3m2", E3M2, 32, E8M0, "floor"),
    Format("mxfp8_e4m3", E4M3, 32, E8M0, "floor"),
    Format("mxfp8_e5m2", E5M2, 32, E8M0, "floor"),
    Format("mxint8", INT8_64, 32, E8M0, "floor"),
    Format("nvfp4", E2M1, 16, E4M3_SCALE, "nearest", tensor_scale="by_role"),
    Format("fp8_e4m3", E4M3, None, None, None, tensor_scale="tensor"),
    Format("fp8_e4m3_row", E4M3, None, None, None, tensor_scale="row"),
    Format("fp8_e4m3_128x128", E4M3, (128, 128), FP32, "nearest"),
    Format("fp8_e5m2", E5M2, None, None, None, tensor_scale="tensor"),
    Format("fp8_e5m2_row", E5M2, None, None, None, tensor_scale="row"),
    Format("fp8_e5m2_128x128", E5M2, (128, 128), FP32, "nearest"),
    Format("int8", INT8, None, None, None, tensor_scale="row"),
    Format("int4_b32", INT4, 32, BF16, "nearest"),
    Format("int4_b64", INT4, 64, BF16, "nearest"),
    Format("int4_b128", INT4, 128, BF16, "nearest"),
)
# Other names that the field has for one of them.
_ALSO_CALLED = {"mxfp8": "mxfp8_e4m3"}

CATALOG: dict[str, Format] = {format.name: format for format in _FORMATS}
CATALOG |= {name: replace(CATALOG[one], name=name) for name, one in _ALSO_CALLED.items()}


def get_format(name: str) -> Format:
    """Return the format the catalogue has under ``name``.

    What a layer does to its weight and to its input are the format's ``as_weight`` and ``as_input``: they differ where
    the tensor scale is ``by_role`` (nvfp4), and there the format itself rounds as a weight.

    Raises: FormatError, with the nearest name, if it has none.
    """
    if name not in CATALOG:
        raise FormatError(f"no format '{name}'; {nearest(name, CATALOG)}")
    return CATALOG[name]
