"""What of a folder that qsurgeon wrote is wrapped, and where it is stored. No value is read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qsurgeon.checkpoint.reading.gate import check_checkpoint
from qsurgeon.checkpoint.reading.headers import FLOATS, Tensor
from qsurgeon.checkpoint.reading.index import read_headers
from qsurgeon.checkpoint.reading.naming import Names, names_in
from qsurgeon.checkpoint.writing.layout import Encoded, Packing
from qsurgeon.errors import ExchangeError
from qsurgeon.layers import Quantization
from qsurgeon.reading import read_json
from qsurgeon.surgery import Module, Record, inventory, operate, read_config, record_in, skeleton

DIVISORS = "qsurgeon-import.json"  # numbers that an import could not keep to the last bit


@dataclass(frozen=True)
class Wrapped:
    """A wrapped weight: its module, how it computes, and where its weight is.

    stored: in full precision, its tensor; or the encoded weight; None for one that has no format.
    name: what its weight is called in the checkpoint, ``….weight``.
    """

    module: Module
    how: Quantization
    name: str
    stored: Tensor | Encoded | None

    @property
    def stem(self) -> str:
        """What its module is called in the checkpoint."""
        return self.name.rpartition(".")[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored of its weight."""
        if isinstance(self.stored, Encoded):
            return tuple(self.stored.tensors.values())
        return () if self.stored is None else (self.stored,)


@dataclass(frozen=True)
class Source:
    """A folder that qsurgeon wrote: its config, its record, its tensors, and what of them is wrapped.

    plain: what the other Linear modules are called in the checkpoint.
    """

    folder: Path
    config: dict[str, Any]
    record: Record
    tensors: Mapping[str, Tensor]
    wrapped: tuple[Wrapped, ...]
    plain: tuple[str, ...]

    @cached_property
    def divisors(self) -> Mapping[str, float]:
        """The divisors that an import read, by tensor, where the scale that it made of one does not tell it again."""
        file = self.folder / DIVISORS
        return dict(read_json(file).get("divisors") or {}) if file.is_file() else {}


def opened(folder: Path, *, trust_remote_code: bool = False) -> Source:
    """Return what is wrapped in ``folder``.

    Raises: ExchangeError for a folder that qsurgeon did not write, and for a weight that is stored otherwise than under
    one name; CheckpointError for one that cannot be loaded.
    """
    config = read_config(folder, trust_remote_code)
    record = record_in(config)
    if record is None:
        raise ExchangeError(
            f"{folder}: was not written by qsurgeon: its config.json has no record of what is wrapped. A recipe is "
            f"applied by: qsurgeon apply RECIPE --model {folder} --output FOLDER"
        )
    check_checkpoint(folder, trust_remote_code=trust_remote_code)
    model = skeleton(config, trust_remote_code)
    modules = {module.name: module for module in inventory(model)}
    hows = record.quantizations()
    operate(model, hows, storage=record.storage)
    tensors = read_headers(folder)
    names = names_in(model, tensors)
    wrapped = tuple(_wrapped(modules[name], how, record, names, tensors, _dtype(config)) for name, how in hows.items())
    others = [module for name, module in modules.items() if module.type == "Linear" and name not in hows]
    plain = tuple(_stem(module, names) for module in others)
    return Source(folder, read_json(folder / "config.json"), record, tensors, wrapped, plain)


def _wrapped(
    module: Module, how: Quantization, record: Record, names: Names, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Wrapped:
    encoding = record.encoding
    if how.weight is None:
        return Wrapped(module, how, f"{_stem(module, names)}.weight", None)
    if encoding is None:
        stored = names.stored.get(module.parameter)
        if stored is None:
            raise ExchangeError(
                f"{module.parameter} is not stored under one name of its own, but joined with others or split. Load "
                "the model with qsurgeon.load, save it with save_pretrained(…, save_original_format=False), and export "
                "that"
            )
        return Wrapped(module, how, stored, tensors[stored])
    format = how.weight.as_weight
    keys = encoding.names(format)
    found = {key: tensors[names.stored[f"{module.module}.{key}"]] for key in keys}
    stem = re.sub(rf"\.{re.escape(keys[0])}$", "", found[keys[0]].name)
    rows, columns = module.row_shape
    return Wrapped(module, how, f"{stem}.weight", Encoded(Packing(format, encoding), found, rows, columns, dtype))


def _stem(module: Module, names: Names) -> str:
    """Return what a module is called in the checkpoint."""
    stored = names.stored.get(module.parameter, module.parameter)
    return stored.rpartition(".")[0]


def _dtype(config: Any) -> torch.dtype:
    """Return the dtype that the model computes in when it is loaded as its config says."""
    dtype = getattr(config, "dtype", None)
    return next((one for one in FLOATS.values() if one == dtype), torch.float32)
