"""Every private name of torch that qsurgeon uses, each behind a plain name, as seen in torch 2.13.

What torch does not document may change in any release. Whoever moves to another version reads this file, and
``tests/test_torch_private.py``, which finds such names elsewhere.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes

Function = TypeVar("Function", bound=Callable[..., Any])

# ---- tensors


def is_traced(x: Tensor) -> bool:
    """Return whether ``x`` is a stand-in whose memory says nothing: under a tracer, torch.func, or lazily zero."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or torch._is_functional_tensor(x)
        or x._is_zerotensor()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_stand_in(x: Tensor) -> bool:
    """Return whether something stands between ``x`` and its memory, or it is lazily negative.

    That is a mode that watches operations, a tracer of torch.jit, a transform of torch.func, or forward-mode autograd.
    What has no memory at all (functional and zero tensors) shows where its memory is asked for. A layer asks this at
    each call, so that it asks the least that there is.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or forward_ad._current_level >= 0
        or x.is_neg()
    )


def is_fake(x: object) -> bool:
    """Return whether ``x`` is a tensor without values, as torch.compile and FakeTensorMode trace with."""
    return bool(fake_tensor.is_fake(x))


def is_transformed(x: Tensor) -> bool:
    """Return whether a transform of torch.func (grad, vmap, jvp) wraps ``x``."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def has_tangent(x: Tensor) -> bool:
    """Return whether ``x`` takes part in forward-mode autograd."""
    # Asking each tensor takes longer, and outside of a level none has a tangent.
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def is_view(x: Tensor) -> bool:
    """Return whether autograd knows ``x`` as a view of another tensor."""
    return x._is_view()


def base_of(x: Tensor) -> Tensor:
    """Return the tensor that autograd knows ``x`` as a view of; itself where it is none."""
    base: Tensor | None = x._base if x._is_view() else None
    return x if base is None else base


def unsafe_view(x: Tensor, shape: torch.Size) -> Tensor:
    """Return a tensor in the memory of ``x`` that autograd knows as no view of it."""
    own: Tensor = torch.ops.aten._unsafe_view(x, shape)
    return own


def writes(x: Tensor) -> int:
    """Return how many times autograd saw ``x`` written to. Raises: RuntimeError for an inference tensor."""
    return x._version


def without_tensor_modes() -> AbstractContextManager[Any]:
    """Let operations inside the block reach no mode that watches or replaces them."""
    return _disable_current_modes()


# A context in which operations on a subclass of Tensor do not ask its __torch_function__.
without_subclass: Callable[[], AbstractContextManager[None]] = torch._C.DisableTorchFunctionSubclass


def is_operator(func: object) -> bool:
    """Return whether ``func`` is an operator of the dispatcher, with a namespace, and no function of Python's."""
    return isinstance(func, torch._ops.OpOverload)


# Private functions and attributes, as __torch_function__ and __torch_dispatch__ name them: what moves bytes, what
# describes a tensor, what copies into another, and what may be set.
PRIVATE_MOVES = frozenset({"_to_copy"})
PRIVATE_DESCRIBES = frozenset({"_storage", "_typed_storage", "_has_compatible_shallow_copy_type"})
PRIVATE_COPIES = frozenset({"_foreach_copy_"})
PRIVATE_SETTABLE = frozenset({"_backward_hooks"})
# The namespace of operators that collective communication consists of.
PRIVATE_NAMESPACES = frozenset({"_c10d_functional"})


# ---- threads: objects that torch hands on to the threads of a backward pass

is_handed_on: Callable[[str], bool] = torch._C._is_key_in_tls
handed_on: Callable[[str], Any] = torch._C._get_obj_in_tls
hand_on: Callable[[str, Any], None] = torch._C._stash_obj_in_tls
hand_on_no_more: Callable[[str], None] = torch._C._remove_obj_from_tls


# ---- modules

# The names under which what torch puts around a module holds it: torch.compile, FSDP, checkpoint_wrapper.
COMPILED_FROM = "_orig_mod"
HOLDING = (COMPILED_FROM, "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# What checkpoints a forward pass, not reentrant: made in the forward pass, with the functions that run it again.
CheckpointFrame: type = checkpoint._CheckpointFrame


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the parts of ``module`` by name; what is written there is written to the module."""
    return module._modules


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the buffers of ``module`` itself by name; what is written there is written to the module."""
    return module._buffers


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the parameters of ``module`` itself by name; what is written there is written to the module."""
    return module._parameters


def is_compiled_in_place(module: nn.Module) -> bool:
    """Return whether ``module.compile()`` was called."""
    return module._compiled_call_impl is not None


# ---- torch.compile


def let_size_vary(x: Tensor, dim: int) -> None:
    """Let torch.compile take the size of ``dim`` for a variable, where it can."""
    torch._dynamo.maybe_mark_dynamic(x, dim)


def run_not_traced(function: Function) -> Function:
    """Let torch.compile run ``function`` and take what it returns for a constant.

    As torch.compiler.assume_constant_result does, which fails while torch._dynamo is being imported: that imports FSDP,
    and FSDP's import is what makes qsurgeon.layers follow.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010  # a function has no such attribute to a type checker
    return function


def is_compiler_error(error: Exception) -> bool:
    """Return whether ``error`` says that torch.compile does not work, and not that what it compiled fails."""
    # Asked by name: importing its exceptions takes a second, in every process.
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


# Triton divides approximately, and fuses products into sums, unless it is told not to.
EXACT_TRITON: dict[str, str | int | bool | Callable[..., Any]] = {
    "emulate_precision_casts": True,
    "eager_numerics.division_rounding": True,
}
