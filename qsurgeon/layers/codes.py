"""The parameters of a packed weight. Their bytes can be moved, but computing with them is an error.

A packed weight is a uint8 Parameter, and torch computes with uint8 as readily as with floats: an average of two codes
is a code of another value. So what is called on Codes decides: what moves, copies or describes bytes works and returns
Codes; all else raises CodesError, which names the layer. The list names what is allowed, so that a function that
nobody thought of is refused. Who asks for the dtype in order to compute in it is told that of the values (``asking``).
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

from qsurgeon.errors import CodesError
from qsurgeon.layers.asking import asks_of_model, asks_of_values
from qsurgeon.patching import Method, patch
from qsurgeon.torch_private import (
    PRIVATE_COPIES,
    PRIVATE_DESCRIBES,
    PRIVATE_MOVES,
    PRIVATE_NAMESPACES,
    PRIVATE_SETTABLE,
    is_operator,
    without_subclass,
)

# What returns the bytes, all or some of them, in some order, in new memory or in the same.
_MOVING = """
    alias as_strided atleast_1d atleast_2d atleast_3d broadcast_to cat chunk clone concat concatenate contiguous cpu
    cuda data detach detach_ dsplit dstack empty_like expand expand_as flatten flip gather hsplit hstack index_select
    moveaxis movedim narrow narrow_copy new_empty permute pin_memory ravel repeat reshape reshape_as rot90 select
    share_memory_ slice split split_with_sizes squeeze stack swapaxes swapdims t take_along_dim tensor_split tile to
    transpose type unbind unflatten unfold unsafe_chunk unsafe_split unsqueeze view view_as vsplit vstack xpu T H mT mH
    __getitem__ __iter__ __reversed__
"""
# What says something of the tensor and not of its values, and what makes another tensor. FSDP makes its shards with
# new_zeros, and computes with them as bytes.
_DESCRIBING = """
    as_subclass data_ptr dim dim_order element_size get_device has_names ndimension nelement new_zeros numel
    record_stream register_hook register_post_accumulate_grad_hook requires_grad_ retain_grad size storage
    storage_offset storage_type stride sym_numel sym_size sym_storage_offset sym_stride untyped_storage __dir__ __hash__
    __len__ __repr__ __sizeof__
"""
_MOVES = PRIVATE_MOVES.union(_MOVING.split())
_DESCRIBES = PRIVATE_DESCRIBES.union(_DESCRIBING.split())
_JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"}
_CASTS = {"to", "type", "view", *PRIVATE_MOVES}
_COMPARES = {"eq", "ne", "equal", "__eq__", "__ne__"}
_COPIES = {"copy_", "__setitem__", *PRIVATE_COPIES}
# What makes something in the dtype of a tensor.
_NEW = {"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"}
_ASKS = {"dtype", "is_floating_point", "to", "type_as", *_NEW}
_SETTABLE = {"data", "grad", "requires_grad", "names", *PRIVATE_SETTABLE}
# Operators that only move bytes: ours, and those of collective communication.
_NAMESPACES = {"qsurgeon", "fsdp", "c10d", *PRIVATE_NAMESPACES}


class Codes(nn.Parameter):
    """A Parameter whose bytes are codes or scales.

    label: names it in errors: the layer's name and its own. values_dtype: what the values are that its layer computes
    with; None for bytes that were taken out of a parameter, such as a state dict's.
    """

    label: str
    values_dtype: torch.dtype | None = None

    def __new__(cls, data: Tensor, requires_grad: bool = False, label: str = "", **attributes: Any) -> "Codes":
        """Return Codes that share the memory of ``data``, uint8. ``attributes`` are kept, as accelerate passes them.

        Raises: CodesError for a tensor of another dtype, or one that is to have a gradient.
        """
        label = label or getattr(data, "label", "")
        if data.dtype != torch.uint8:
            raise CodesError(f"{label or _NAMELESS} is to be {data.dtype}; packed codes are torch.uint8")
        if requires_grad:
            raise CodesError(_no_gradient(label))
        with without_subclass():
            made: Codes = data.detach().as_subclass(cls)
        vars(made).update({**vars(data), **attributes, "label": label, "_is_param": True})
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, if it leaves the codes what they are. Raises: CodesError."""
        kwargs = kwargs or {}
        with without_subclass():
            name = _name(func)
            if name in _ASKS and (asked := _of_values(func, name, args, kwargs)) is not None:
                return asked
            operands = list(_tensors((*args, *kwargs.values())))
            label = next((one.label for one in operands if isinstance(one, Codes)), "")
            if _asks_for_gradient(func, name, args, kwargs):
                raise CodesError(_no_gradient(label))
            if not _allows(func, name, operands, args, kwargs):
                if _here.is_averaging:
                    return _average(func, args, kwargs)
                raise CodesError(_no(label, name))
            found = func(*args, **kwargs)
            if name in _MOVES:
                found = _marked(found, label, operands)
                if name == "data" and isinstance(found, Codes):
                    found.values_dtype = args[0].values_dtype
            return found

    def plain(self) -> nn.Parameter:
        """Return an ordinary Parameter that shares the memory."""
        with without_subclass():
            return self.as_subclass(nn.Parameter)

    def set_(self, *_: Any, **__: Any) -> "Codes":
        """Refuse to be other memory: torch does not ask ``__torch_function__`` about it. Raises: CodesError."""
        raise CodesError(_no(self.label, "set_"))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Codes":
        """Return Codes with memory of their own."""
        if id(self) not in memo:
            memo[id(self)] = type(self)(self.plain().detach().clone(), **vars(self))
        made: Codes = memo[id(self)]
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as an ordinary tensor, which ``torch.load`` reads without this package; layers mark it again."""
        plain = self.plain()
        return (plain if getattr(self, "_is_param", False) else plain.data).__reduce_ex__(protocol)


def plain(tensor: Tensor) -> Tensor:
    """Return ``tensor``, or what can be computed with in the place of Codes; it shares the memory."""
    return tensor.plain() if isinstance(tensor, Codes) else tensor


class _Here(threading.local):
    is_averaging = False


_here = _Here()
_NAMELESS = "the weight of a packed layer"


def _no(label: str, name: str) -> str:
    return (
        f"{label or _NAMELESS} holds packed codes, not numbers, and '{name}' would compute with them. The layer's "
        "opened() returns its values; train or average parameters with requires_grad alone, or use storage: master"
    )


def _no_gradient(label: str) -> str:
    return (
        f"{label or _NAMELESS} holds packed codes, which cannot be trained. Train an adapter on the layer, or use "
        "storage: master"
    )


def _name(func: Any) -> str:
    """Return the name of what was called; of a property, its own."""
    name = str(getattr(func, "__name__", func))
    if name in ("__get__", "__set__", "__delete__"):
        return str(func.__self__.__name__)
    return name.partition(".")[0] if is_operator(func) else name


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _of_values(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return what is asked of codes, if it is answered for the values that they stand for; None if it is not."""
    codes = next((one for one in (*args, *kwargs.values()) if isinstance(one, Codes)), None)
    dtype = None if codes is None else codes.values_dtype
    if codes is None or dtype is None or is_operator(func):
        return None
    above = 2  # that is where __torch_function__ was called
    if name == "is_floating_point":
        return dtype.is_floating_point if asks_of_model(above) else None
    if not asks_of_values(above):
        return None
    if name == "dtype":
        return dtype
    if name not in _NEW and args[0] is codes:
        return None
    like = torch.empty(0, dtype=dtype, device=codes.device)
    replaced = {key: like if one is codes else one for key, one in kwargs.items()}
    return func(*(like if one is codes else one for one in args), **replaced)


def _allows(func: Any, name: str, operands: list[Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether ``func`` leaves codes what they are."""
    access = getattr(func, "__name__", "")
    are_bytes = all(one.dtype == torch.uint8 for one in operands)
    if access == "__get__" or (is_operator(func) and func.namespace in _NAMESPACES):
        return True
    if str(getattr(func, "__module__", "")).startswith("torch.distributed."):
        return "reduce" not in name  # broadcast, scatter, gather, send: what DTensor makes its parts with
    if access == "__set__":
        return name in _SETTABLE and are_bytes
    if name in _COMPARES:
        return are_bytes and len(operands) == 2
    if name in _COPIES:
        source = args[2] if name == "__setitem__" else args[1]
        return are_bytes and isinstance(source, (Tensor, list, tuple))
    if name in _CASTS:
        return not _changes_dtype(args, kwargs)
    if name in _JOINS:
        return are_bytes
    if name == "numpy":  # accelerate keeps weights on a disk so
        return not asks_of_values(2)
    return name in _MOVES | _DESCRIBES or (name.startswith(("is_", "_is_")) and name != "is_nonzero")


def _asks_for_gradient(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if getattr(func, "__name__", "") == "__set__":
        return name == "requires_grad" and bool(args[1])
    return name == "requires_grad_" and bool((*args[1:], *kwargs.values(), True)[0])


def _changes_dtype(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    given = [*args[1:], *kwargs.values()]
    named = [one.dtype if isinstance(one, Tensor) else one for one in given]
    dtypes = [one for one in named if isinstance(one, torch.dtype)]
    kinds = [one for one in named if isinstance(one, (str, type)) and "Tensor" in str(one)]
    return any(one != torch.uint8 for one in dtypes) or any("ByteTensor" not in str(one) for one in kinds)


def _marked(found: Any, label: str, operands: list[Tensor]) -> Any:
    """Return ``found``, with tensors of bytes as Codes; what was handed in comes back as it is."""
    if isinstance(found, (list, tuple)):
        return type(found)(_marked(one, label, operands) for one in found)
    if not isinstance(found, Tensor) or found.dtype != torch.uint8 or any(found is one for one in operands):
        return found
    made = found.as_subclass(Codes)
    made.label = label
    return made


# ---- averages


def _average(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return the average of codes that are equal, which is these codes, whatever function of them ``func`` is.

    Raises: CodesError for codes that differ.
    """
    groups = [one for one in args if isinstance(one, (list, tuple))]
    if not groups:
        return _one_of([one for one in args if isinstance(one, Codes)])
    places = range(len(groups[0]))
    averaged = {i: [one[i] for one in groups if isinstance(one[i], Codes)] for i in places}
    rest = [i for i in places if not averaged[i]]
    taken = [[one[i] for i in rest] if isinstance(one, (list, tuple)) else one for one in args]
    others = iter(func(*taken, **kwargs) or () if rest else ())
    return [_one_of(averaged[i]) if averaged[i] else next(others, None) for i in places]


def _one_of(equal: list["Codes"]) -> "Codes":
    first, *others = equal
    for other in others:
        if not torch.equal(first.plain(), other.plain()):
            raise CodesError(
                f"{first.label or _NAMELESS} holds packed codes, which differ between the model and its average: "
                "codes cannot be averaged. Use storage: master"
            )
    return first


@contextmanager
def _averaging() -> Iterator[None]:
    before, _here.is_averaging = _here.is_averaging, True
    try:
        yield
    finally:
        _here.is_averaging = before


def _refusing_codes(apply: Method) -> Method:
    def refuse_or_apply(module: nn.Module, name: str, *args: Any) -> Any:
        found = getattr(module, name, None)
        if isinstance(found, Codes):
            raise CodesError(_no(found.label, "weight_norm"))
        return apply(module, name, *args)

    return refuse_or_apply


def _keeping_codes(update: Method) -> Method:
    """Let an average of models keep codes that are equal in all of them, as those of a frozen base are."""

    def update_parameters(self: Any, model: nn.Module) -> None:
        with _averaging():
            update(self, model)

    return update_parameters


patch(AveragedModel, "update_parameters", _keeping_codes)
# It deletes the parameter before it computes with it.
patch(WeightNorm, "apply", _refusing_codes)
