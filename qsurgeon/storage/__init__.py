"""How a quantized weight is stored: tensor names, shapes, and bytes. Each encoding registers itself."""

from qsurgeon.storage.encoding import ENCODINGS, MASTER, Encoding, Slot, StorageName, encoding_of, register, storages
from qsurgeon.storage.packed import PACKED

__all__ = [
    "ENCODINGS",
    "MASTER",
    "PACKED",
    "Encoding",
    "Slot",
    "StorageName",
    "encoding_of",
    "register",
    "storages",
]
