"""Rounded weights that are kept while something generates, so that they are not rounded again for each token.

When a kept weight may be used is the question. What torch counts is not enough: ``weight.data.add_(delta)`` and a fused
optimizer (torch 2.13) change a weight and no version of it, memory that FSDP gives back may come again at the same
place, and a tensor of inference mode has no version. So the time is bounded: a ``Keeping`` lasts for one call of
``generate``, in which nothing trains. Inside of it a change that torch does count, other memory or another Parameter is
seen at once, and the weight is rounded again. And when it ends, each weight that was used from here is rounded once
more and compared: a change that could not be seen is an error, not a wrong result.

Nothing of this hangs on a module or a weight, so that nothing is saved, copied or moved with them.
"""

import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from qsurgeon.errors import UsageError
from qsurgeon.telling import say
from qsurgeon.torch_private import base_of, writes

Round = Callable[[Tensor, Any], Tensor]  # of a weight, as a Quantization says
SHARE = 0.5  # of the memory that is free when the first weight is kept

_most: int | None = None
# The ids of weights whose memory was given back before they could be compared: they are rounded at each call from then
# on, and so is what gets their id after them.
_not_kept: set[int] = set()


class _State(NamedTuple):
    """All that torch says of a weight's memory."""

    at: int
    version: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, weight: Tensor) -> "_State":
        version = -1 if weight.is_inference() else writes(weight)
        return cls(weight.data_ptr(), version, weight.shape, weight.stride(), weight.dtype, weight.device)

    def is_of(self, weight: Tensor) -> bool:
        """Return whether torch says the same of ``weight``."""
        return (
            weight.data_ptr() == self.at
            and (weight.is_inference() or writes(weight) == self.version)
            and weight.shape == self.shape
            and weight.stride() == self.stride
            and weight.dtype is self.dtype
            and weight.device == self.device
        )


class Besides(NamedTuple):
    """What rounded values are computed from beside a weight: parameters, such as an adapter's, and numbers."""

    parameters: tuple[Tensor, ...] = ()
    numbers: tuple[float, ...] = ()


NOTHING = Besides()


class _Kept:
    """A weight's rounded values, and what they were rounded from."""

    __slots__ = ("besides", "how", "name", "numbers", "owner", "round", "state", "uses", "values")

    def __init__(
        self, owner: "ReferenceType[Tensor]", weight: Tensor, how: Any, round: Round, name: str, besides: Besides
    ) -> None:
        self.owner, self.state, self.how, self.round, self.name = owner, _State.of(weight), how, round, name
        self.besides, self.numbers = tuple((ref(one), _State.of(one)) for one in besides.parameters), besides.numbers
        self.values, self.uses = round(weight, how), 0

    def is_of(self, owner: Tensor, weight: Tensor, besides: Besides) -> bool:
        """Return whether torch says of all that the values were computed from that it is the same, and unchanged."""
        return (
            self.owner() is owner
            and self.state.is_of(weight)
            and besides.numbers == self.numbers
            and len(besides.parameters) == len(self.besides)
            and all(
                known() is one and state.is_of(one)
                for one, (known, state) in zip(besides.parameters, self.besides, strict=True)
            )
        )

    def check(self) -> None:
        """Do nothing if the weight still has the values that were rounded. Raises: UsageError."""
        owner = self.owner()
        if owner is None or not self.uses:
            return
        shape, stride = self.state.shape, self.state.stride
        if owner.untyped_storage().size() == 0 or owner.is_meta:
            _not_kept.add(id(owner))
            say(
                f"the weight of {self.name or 'a layer'} was freed while a generation ran, and could not be compared "
                "with what it was rounded from; it is rounded at each call from now on"
            )
            return
        weight = owner.detach()
        if (weight.shape, weight.stride()) != (shape, stride):
            weight = weight.as_strided(shape, stride)
        besides = [(known(), state) for known, state in self.besides]
        if not self.state.is_of(weight) or not all(one is not None and state.is_of(one) for one, state in besides):
            return  # it was seen to change after its last use
        again = self.round(weight, self.how)
        if not torch.equal(_bits(again), _bits(self.values)):
            raise UsageError(
                f"the weight of {self.name or 'a layer'} changed while a generation ran, through .data, a fused "
                "optimizer or memory that torch does not watch, and tokens were computed with its values from before. "
                "Change weights between generations; qsurgeon.keep_at_most(0) rounds them at each call"
            )


class Keeping:
    """The rounded weights of one generation.

    most: how many bytes they may take; as ``keep_at_most`` says without it. What has no room is rounded at each call.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = _most if most is None else most
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._changing = threading.Lock()
        self.size = 0
        self.is_open = True

    def rounded(self, weight: Tensor, how: Any, round: Round, name: str, besides: Besides = NOTHING) -> Tensor:
        """Return ``round(weight, how)``, which no gradient is wanted of, kept from an earlier call or for a later one.

        name: of the layer, for errors. besides: what ``round`` reads beside the weight.
        """
        owner = base_of(weight)
        kept = self._kept.get((id(owner), id(how)))
        if kept is not None and kept.is_of(owner, weight, besides):
            kept.uses += 1
            return kept.values
        return self._round(owner, weight, how, round, name, besides)

    def close(self) -> None:
        """Give all weights back. Raises: UsageError if one that was used changed unseen."""
        kept = self.drop()
        while kept:
            kept.pop().check()

    def drop(self) -> list[_Kept]:
        """Give all weights back, and return them; nothing is kept from now on."""
        with self._changing:
            found, self._kept, self.is_open, self.size = list(self._kept.values()), {}, False, 0
        return found

    def _round(self, owner: Tensor, weight: Tensor, how: Any, round: Round, name: str, besides: Besides) -> Tensor:
        key = (id(owner), id(how))
        self._forget(key)
        size = weight.numel() * weight.element_size()
        with self._changing:
            has_room = self.is_open and self.size + size <= self._limit(weight)
            self.size += size if has_room else 0
        if not has_room or not weight.data_ptr() or id(owner) in _not_kept:
            return round(weight, how)
        made = _Kept(ref(owner, lambda _: self._forget(key)), weight, how, round, name, besides)
        with self._changing:
            if self.is_open:
                self._kept[key] = made
        return made.values

    def _forget(self, key: tuple[int, int]) -> None:
        found = self._kept.pop(key, None)
        if found is not None:
            self.size -= found.values.numel() * found.values.element_size()

    def _limit(self, weight: Tensor) -> int:
        if self._most is None:
            self._most = int(SHARE * _free(weight.device))
        return self._most


def keep_at_most(size: int | None) -> None:
    """Set how many bytes of rounded weights a generation keeps; 0: none. None, the default: half of what is free.

    It holds for the whole process, and for generations that begin after it. Raises: UsageError for less than 0.
    """
    global _most  # noqa: PLW0603  # a setting of the process
    if size is not None and size < 0:
        raise UsageError(f"a generation cannot keep {size} bytes; expected 0 or more, or None")
    _most = size


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)  # NaN equals itself so


def _free(device: torch.device) -> int:
    """Return how many bytes of a device's memory nothing uses; of other devices than these, none are known to be."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0
