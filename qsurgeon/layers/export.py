"""What a wrapped layer can be exported as: a torch.export program, and nothing that would change its results."""

import torch

from qsurgeon.errors import ExportError
from qsurgeon.torch_private import run_not_traced

_ADVICE = (
    "torch.export.export keeps what it computes; with storage: master, `with qsurgeon.disabled(model)` exports it in "
    "full precision"
)


def refuse_export(training: bool) -> None:
    """Do nothing but while torch makes a program of the layer that calls this, which is in ``training`` or not.

    Raises: ExportError for what the program would lose in silence. TorchScript and a torch.export program keep the
    operations of a forward pass, and no gradient of ours. ONNX has no operations on the bits of numbers.
    """
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            _refuse_program(training and torch.is_grad_enabled())
    elif torch.jit.is_tracing():
        what = "exported to ONNX" if torch.onnx.is_in_onnx_export() else "traced by torch.jit"
        raise ExportError(f"a wrapped layer cannot be {what}: {_ADVICE}")


# Dynamo takes torch's own answer to this for a constant, False, and cannot build an exception: this is run, not traced.
@run_not_traced
def _refuse_program(training: bool) -> None:
    if torch.onnx.is_in_onnx_export():
        raise ExportError(f"a wrapped layer cannot be exported to ONNX: {_ADVICE}")
    if training:
        raise ExportError(
            "a wrapped layer cannot be exported to be trained: its gradient would be lost. Call model.eval() before "
            "torch.export.export, or call that under torch.no_grad()"
        )


def refuse_script() -> None:
    """Say that torch.jit cannot make a script of a wrapped layer. Raises: ExportError, always."""
    raise ExportError(f"a wrapped layer cannot be scripted by torch.jit: {_ADVICE}")
