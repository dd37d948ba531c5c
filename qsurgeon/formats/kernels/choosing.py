"""Which backend computes: the first that is wanted and supports the format, the dtype, the device and the operation.

On a CPU it is native.cpp, compiled for the format; on a GPU the operations of arithmetic.py, compiled by torch.compile
into one Triton kernel each (compiled.py); where there is no compiler, or a backend does not support something, the same
operations one by one (pieces.py). All of them give the same bits. ``QSURGEON_KERNELS`` (native, compile, eager) takes
the choice away from this module.

Under ``torch.set_flush_denormal(True)``, which belongs to a thread, native code computes in the mode of the thread that
called it, as the other backends do on one thread: subnormal values are rounded as zeros. Torch's own operations on
several threads flush on some of them.
"""

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from qsurgeon.errors import FormatError, nearest
from qsurgeon.formats.fields import Fields
from qsurgeon.formats.kernels.backend import Backend, Operation
from qsurgeon.formats.kernels.compiled import COMPILED
from qsurgeon.formats.kernels.native import NATIVE
from qsurgeon.formats.kernels.pieces import EAGER
from qsurgeon.torch_private import is_traced

VARIABLE = "QSURGEON_KERNELS"
# In the order in which they are asked.
BACKENDS: list[Backend] = [NATIVE, COMPILED, EAGER]
KINDS = tuple(backend.name for backend in BACKENDS)
_PLAIN = (Tensor, torch.nn.Parameter)
_chosen: dict[tuple[object, ...], Backend] = {}


def backend_for(rows: Tensor, fields: Fields, operation: Operation) -> Backend:
    """Return what computes ``operation``, of ``rows`` or with a result like ``rows``.

    Raises: FormatError for a word that QSURGEON_KERNELS cannot be, and for what no backend supports.
    """
    wanted = os.environ.get(VARIABLE, "")
    device, dtype = rows.device.type, rows.dtype
    has_memory = type(rows) in _PLAIN and rows.layout == torch.strided and not is_traced(rows)
    key = (wanted, fields.kernel_key, dtype, device, operation, has_memory, *BACKENDS)
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _choose(wanted, fields, dtype, device, operation, has_memory)
    return found


def kind_for(rows: Tensor, fields: Fields) -> str:
    """Return the name of the backend that rounds ``rows``. Raises: as ``backend_for``."""
    return backend_for(rows, fields, "fake_quantize").name


def _choose(
    wanted: str, fields: Fields, dtype: torch.dtype, device: str, operation: Operation, has_memory: bool
) -> Backend:
    for backend in _asked(wanted, device):
        if (
            (has_memory or not backend.reads_memory)
            and backend.supports(fields, dtype, device, operation)
            and backend.is_ready(fields, dtype)
        ):
            return backend
    raise FormatError(f"no backend computes {operation} of format '{fields.name}' in {dtype} on {device}")


def product_backend_for(input: Fields | None, weight: Fields, dtype: torch.dtype, device: str) -> Backend | None:
    """Return the first backend that multiplies such codes; None if they are to be dequantized first.

    Raises: FormatError for a word that QSURGEON_KERNELS cannot be.
    """
    wanted = os.environ.get(VARIABLE, "")
    found = (one for one in _asked(wanted, device) if one.supports_product(input, weight, dtype, device))
    return next(found, None)


def _asked(wanted: str, device: str) -> Iterator[Backend]:
    """Yield the backends that may run, best first: what is wanted, then what runs everywhere."""
    names = [backend.name for backend in BACKENDS]
    if wanted and wanted not in names:
        raise FormatError(f"{VARIABLE} is '{wanted}'; {nearest(wanted, names)}")
    for backend in BACKENDS:
        everywhere = backend.preferred_on is None
        if backend.name == wanted if wanted else everywhere or device in (backend.preferred_on or ()):
            yield backend
    yield from (backend for backend in BACKENDS if wanted and backend.preferred_on is None)


def is_opaque(rows: Tensor) -> bool:
    """Return whether what watches torch operations is to see one of ours instead of those that it is made of.

    Inside a model that is being compiled, a CPU sees one opaque operator and a GPU the operations, to fuse them with
    others.
    """
    return rows.device.type == "cpu" and (torch.compiler.is_compiling() or is_traced(rows))
