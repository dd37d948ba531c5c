"""The weights of a checkpoint, or of a live model, in slabs of whole rows: what is measured without loading a model."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsurgeon.checkpoint import refuse_quantized_weight
from qsurgeon.checkpoint.reading.headers import FLOATS
from qsurgeon.checkpoint.reading.headers import Tensor as Stored
from qsurgeon.checkpoint.reading.naming import Names
from qsurgeon.checkpoint.writing.stream import read_into
from qsurgeon.errors import CheckpointError
from qsurgeon.surgery import Module

SLAB = 2**20  # values: what is made of them stays in a CPU's cache

Slabs = Callable[[int], Iterator[Tensor]]  # from how many rows a slab is a multiple of; 0: the whole at once


@dataclass(frozen=True)
class Weights:
    """Where each weight of a model is: in its files, or in ``model`` itself.

    tensors, names: what the files have, and what of the model it is; without them the model is live.
    """

    model: nn.Module
    tensors: Mapping[str, Stored]
    names: Names | None = None

    def size(self, module: Module) -> int:
        """Return how many bytes are read of a module's weight."""
        return module.weight_bytes

    @contextmanager
    def opened(self, module: Module) -> Iterator[Slabs]:
        """Yield the slabs of a module's weight as (…, rows, inputs), each a matrix; each is valid until the next.

        Raises: CheckpointError for a weight that is missing, of another shape than the config says, no ordinary float,
        or part of a checkpoint that another tool quantized.
        """
        if self.names is None:
            weight = self.model.get_submodule(module.path).get_parameter(module.weight).detach()
            yield _slabs_of(module.declared.rows(weight))
            return
        name = module.tied_weight if module.tied_weight else module.parameter
        if name in self.names.converted:
            yield _slabs_of(module.declared.rows(self._converted(name, module)))
            return
        refuse_quantized_weight(self.names.stored.get(name, name), self.tensors)
        if name not in self.names.stored:
            raise CheckpointError(f"no file has a tensor for {module.parameter}")
        stored = self.tensors[self.names.stored[name]]
        _check(stored, module)
        with _open(stored.file) as handle:
            if module.declared.is_transposed or len(stored.shape) != 2:
                yield _slabs_of(module.declared.rows(_read(handle, stored)))
            else:
                yield lambda height: _streamed(handle, stored, height)

    def _converted(self, name: str, module: Module) -> Tensor:
        """Return the parameter ``name``, which transformers makes of stored tensors when it loads them."""
        assert self.names is not None
        conversion = self.names.converted[name]

        def read(stored: str) -> Tensor:
            refuse_quantized_weight(stored, self.tensors)
            with _open(self.tensors[stored].file) as handle:
                return _read(handle, self.tensors[stored])

        made = conversion.run(self.model, read).get(name)
        if made is None or tuple(made.shape) != module.shape:
            shape = "nothing" if made is None else list(made.shape)
            raise CheckpointError(
                f"{module.parameter} is made of {conversion.tensors[0]} and others; they make {shape}, config.json "
                f"says {list(module.shape)}"
            )
        return made


def _check(stored: Stored, module: Module) -> None:
    if stored.shape != module.shape:
        raise CheckpointError(
            f"{stored.file}: {stored.name} has shape {list(stored.shape)}, config.json says {list(module.shape)}"
        )


def _slabs_of(weight: Tensor) -> Slabs:
    """Return the slabs of a weight (…, rows, inputs) that is in memory."""

    def slabs(height: int) -> Iterator[Tensor]:
        for matrix in weight.reshape(-1, *weight.shape[-2:]):
            most = _rows(matrix.shape[0], matrix.shape[1], height)
            for start in range(0, matrix.shape[0], most):
                yield matrix[start : start + most]

    return slabs


def _rows(rows: int, columns: int, height: int) -> int:
    """Return how many rows a slab has."""
    return max(1, SLAB // max(1, columns * height)) * height if height else max(rows, 1)


@contextmanager
def _open(file: Path) -> Iterator[int]:
    handle = os.open(file, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _read(handle: int, stored: Stored) -> Tensor:
    """Return a whole tensor."""
    data = torch.empty(stored.size, dtype=torch.uint8)
    read_into(handle, stored, 0, data)
    return data.view(FLOATS[stored.dtype]).view(stored.shape)


def _streamed(handle: int, stored: Stored, height: int) -> Iterator[Tensor]:
    rows, columns = stored.shape
    dtype: Any = FLOATS[stored.dtype]
    row = columns * dtype.itemsize
    most = _rows(rows, columns, height)
    buffer = torch.empty(min(most, rows) * row, dtype=torch.uint8)
    for start in range(0, rows, most):
        data = buffer[: min(most, rows - start) * row]
        read_into(handle, stored, start * row, data)
        yield data.view(dtype).view(-1, columns)
