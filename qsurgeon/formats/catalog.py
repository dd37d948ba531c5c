"""The named formats: one line each."""

from qsurgeon.errors import FormatError, nearest
from qsurgeon.formats.block import Format
from qsurgeon.formats.element import E2M1, E4M3, E8M0

_FORMATS = (
    Format("mxfp4", E2M1, block=32, scale=E8M0, scale_rule="floor"),
    Format("mxfp8", E4M3, block=32, scale=E8M0, scale_rule="floor"),
    Format("nvfp4", E2M1, block=16, scale=E4M3, scale_rule="nearest", tensor_scale="by_role"),
)

CATALOG: dict[str, Format] = {format.name: format for format in _FORMATS}


def get_format(name: str) -> Format:
    """Return the format the catalogue has under ``name``.

    Raises: FormatError, with the nearest name, if it has none.
    """
    if name not in CATALOG:
        raise FormatError(f"no format '{name}'; {nearest(name, CATALOG)}")
    return CATALOG[name]
