"""What torch.compile adds to a model, and how to run without it.

``torch.compile(module)`` returns another module that holds the first as ``_orig_mod`` (torch 2.13), which may stand
anywhere in a model: around it, in the place of a part, of each block (accelerate's ``compile_regions``), of one layer.
``module.compile()`` changes no name.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from qsurgeon.torch_private import COMPILED_FROM, children, is_compiled_in_place

HELD = COMPILED_FROM


def compiled_from(module: nn.Module) -> nn.Module | None:
    """Return what torch.compile made ``module`` of; None if it did not."""
    # Not by getattr: accelerate lets a model remember the original under the same name, and that is no part of it.
    return children(module).get(HELD)


def uncompiled_name(path: str) -> str:
    """Return the name, in the model as it was before torch.compile, of the module at ``path``."""
    return ".".join(part for part in path.split(".") if part != HELD)


def is_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile made ``model`` or a part of it, as a copy or in place."""
    return any(HELD in children(one) or is_compiled_in_place(one) for one in model.modules())


def eagerly(model: nn.Module) -> AbstractContextManager[None]:
    """Let a compiled model run eagerly inside the block: what was compiled before does not see a hook made since."""
    if not is_compiled(model):
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Let ``model`` hold, inside the block, what its parts were compiled from: no name says ``_orig_mod`` there."""
    held = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in children(parent).items()
        if child is not None and compiled_from(child) is not None
    ]
    try:
        for parent, name, child in held:
            children(parent)[name] = _innermost(child)
        yield
    finally:
        for parent, name, child in held:
            children(parent)[name] = child


def _innermost(module: nn.Module) -> nn.Module:
    inner = compiled_from(module)
    return module if inner is None else _innermost(inner)
