"""What there is to import in a folder, and which modules of the model it belongs to. No weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qsurgeon.checkpoint.hub import origin
from qsurgeon.checkpoint.kept import kept_names
from qsurgeon.checkpoint.reading.gate import check_generation
from qsurgeon.checkpoint.reading.headers import Tensor
from qsurgeon.checkpoint.reading.index import read_headers
from qsurgeon.checkpoint.reading.naming import names_in
from qsurgeon.errors import ExchangeError
from qsurgeon.exchange.exporting import REPORT, digest
from qsurgeon.exchange.foreign import Foreign, number_in, with_static
from qsurgeon.exchange.grids import Grid
from qsurgeon.exchange.modelopt import CONFIG as MODELOPT_CONFIG
from qsurgeon.exchange.readers import READERS
from qsurgeon.formats import Format
from qsurgeon.layers import Quantization
from qsurgeon.reading import read_json
from qsurgeon.storage import MASTER, PACKED
from qsurgeon.surgery import QUANT_METHOD, Module, Record, inventory, read_config, read_record, skeleton
from qsurgeon.surgery.headline import Part, headline
from qsurgeon.surgery.record import Header, make_record
from qsurgeon.version import __version__

SECTIONS = ("quantization_config", "compression_config")
CACHE_SCALES = ("k_scale", "v_scale", "q_scale", "kv_scale")
RULE = "imported"


@dataclass(frozen=True)
class Weight:
    """A weight to be imported: what it is stored as, its module, how it computes, and its name in the output."""

    foreign: Foreign
    module: Module
    how: Quantization
    name: str

    @property
    def format(self) -> Format:
        """The format that its codes are of."""
        assert self.how.weight is not None
        own = self.how.weight.as_weight
        return own if Grid.of_weight(own) == Grid.of_weight(self.foreign.weight) else self.foreign.weight.as_weight


@dataclass(frozen=True)
class Incoming:
    """A folder that another tool quantized.

    scales: what ``export`` kept of tensor scales that are stored as divisors, if it wrote the folder. dropped: tensors
    that nothing here has a place for.
    """

    folder: Path
    config: dict[str, Any]
    method: str
    record: Record
    tensors: Mapping[str, Tensor]
    weights: tuple[Weight, ...]
    scales: Mapping[str, float]
    dtype: torch.dtype
    dropped: tuple[str, ...]
    summary: str

    @property
    def encodes(self) -> bool:
        """Whether codes stay codes."""
        return self.record.storage != MASTER


def incoming(folder: Path, *, dequantize: bool = False, trust_remote_code: bool = False) -> Incoming:
    """Return what there is to import in ``folder``.

    Raises: ExchangeError for what nothing here computes; CheckpointError for what is no checkpoint.
    """
    loaded = read_config(folder, trust_remote_code)
    config = read_json(folder / "config.json")
    section = section_of(folder, config)
    method = str(section["quant_method"])
    tensors = read_headers(folder)
    check_generation(folder)
    foreign = tuple(READERS[method].weights(section, tensors))
    if not foreign:
        raise ExchangeError(f"{folder}: its config says that it is quantized by {method}, and no tensor of it is")
    for key in SECTIONS:
        if hasattr(loaded, key):
            delattr(loaded, key)
    model = skeleton(loaded, trust_remote_code)
    modules = _modules(model, foreign, tensors)
    report = _report(folder, config)
    storage = MASTER if dequantize else PACKED.name
    record = _recorded(report, foreign, modules, storage) or _made(foreign, modules, storage, origin(folder))
    hows = record.quantizations()
    names = _names(model, foreign, modules, storage)
    weights = tuple(Weight(one, modules[one.stem], hows[modules[one.stem].name], names[one.stem]) for one in foreign)
    scales = {} if report is None else {name: float(one) for name, one in report.get("tensor_scales", {}).items()}
    dropped = tuple(name for name in tensors if name.rpartition(".")[2] in CACHE_SCALES)
    summary = headline(Part.of(module, hows.get(module.name)) for module in inventory(model))
    dtype = getattr(loaded, "dtype", None)
    own = dtype if isinstance(dtype, torch.dtype) else torch.float32
    return Incoming(folder, config, method, record, tensors, weights, scales, own, dropped, summary)


def section_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of how it was quantized. Raises: ExchangeError if it says nothing that is known."""
    found = next((config[key] for key in SECTIONS if isinstance(config.get(key), dict)), None)
    older = folder / MODELOPT_CONFIG
    if found is None and older.is_file():
        found = {"quant_method": "modelopt"}
    if found is None:
        raise ExchangeError(
            f"{folder}: is not quantized; a recipe is applied by: qsurgeon apply RECIPE --model {folder}"
        )
    method = found.get("quant_method")
    if method == QUANT_METHOD:
        raise ExchangeError(f"{folder}: was written by qsurgeon; it is opened by: qsurgeon.load({str(folder)!r})")
    if method not in READERS:
        raise ExchangeError(f"{folder}: is quantized by {method}; imported are: {', '.join(READERS)}")
    if method == "modelopt" and "quant_algo" not in found and older.is_file():
        found = {**found, **(read_json(older).get("quantization") or {})}
    return dict(found)


def _modules(model: Any, foreign: tuple[Foreign, ...], tensors: Mapping[str, Tensor]) -> dict[str, Module]:
    """Return the module of each weight, by what it is called in the checkpoint.

    Raises: ExchangeError for a weight that the model has no Linear module for, or one of another shape.
    """
    parts = {tensor.name for one in foreign for tensor in (*one.tensors.values(), *one.beside)}
    whole = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for one in foreign:
        codes, name = one.tensors[one.encoding.codes[0]], f"{one.stem}.weight"
        whole[name] = replace(codes, name=name, shape=(one.rows, one.columns), dtype="BF16")
    back = {stored: parameter for parameter, stored in names_in(model, whole).stored.items()}
    by_parameter = {module.parameter: module for module in inventory(model)}
    found = {}
    for one in foreign:
        module = by_parameter.get(back.get(f"{one.stem}.weight", ""))
        if module is None or module.type != "Linear":
            raise ExchangeError(
                f"{one.stem} is quantized, and the model has no Linear module that its weight is of alone"
            )
        if module.shape != (one.rows, one.columns):
            raise ExchangeError(
                f"{one.stem} has {one.rows} outputs and {one.columns} inputs, config.json says {list(module.shape)}"
            )
        found[one.stem] = module
    return found


def _report(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what ``export`` kept beside the weights, if it was made with this very config."""
    file = folder / REPORT
    found = read_json(file) if file.is_file() else {}
    return found if found.get("config") == digest(config.get("quantization_config")) else None


def _recorded(
    report: Mapping[str, Any] | None, foreign: tuple[Foreign, ...], modules: Mapping[str, Module], storage: str
) -> Record | None:
    """Return the record that the folder was exported from, for another storage; None if it is of other formats."""
    if report is None:
        return None
    record = read_record({**report["record"], "storage": storage}, REPORT)
    hows = record.quantizations()
    for one in foreign:
        how = hows.get(modules[one.stem].name)
        if how is None or how.weight is None or Grid.of_weight(how.weight) != Grid.of_weight(one.weight):
            return None
    return record


def _made(foreign: tuple[Foreign, ...], modules: Mapping[str, Module], storage: str, name: str) -> Record:
    """Return a record of what the files say.

    The tensor scale of a master weight is the one that its codes had, as a static one: found anew it may be another.
    """
    taken = {}
    for one in foreign:
        weight, above = one.weight, one.encoding.above
        if storage == MASTER and above is not None and not weight.as_weight.has_row_scales:
            number = number_in(one.tensors[above.name])
            scale = torch.tensor(number, dtype=torch.float32)
            weight = with_static(weight.name, float(scale.reciprocal() if above.divides else scale))
        taken[modules[one.stem].name] = Quantization(weight, one.input, rule=RULE)
    return make_record(Header(__version__, storage, name, ""), taken, {})


def _names(model: Any, foreign: tuple[Foreign, ...], modules: Mapping[str, Module], storage: str) -> dict[str, str]:
    """Return what each weight is called in the output, ``….weight``, by its module's name in the checkpoint."""
    plain = {one.stem: f"{one.stem}.weight" for one in foreign}
    if storage == MASTER:
        return plain
    keys = {modules[one.stem].module: PACKED.names(one.weight.as_weight) for one in foreign}
    kept = kept_names(model, keys)
    own = {stem: modules[stem].parameter for stem in plain}
    return {stem: own[stem] if own[stem] in kept else name for stem, name in plain.items()}
