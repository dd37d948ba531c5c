"""Import what another tool quantized: the same codes as packed weights, or their values as master weights."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qsurgeon.checkpoint.card import with_record, without_record
from qsurgeon.checkpoint.card.front_matter import CARD
from qsurgeon.checkpoint.hub import fetch
from qsurgeon.checkpoint.reading.files import companions, write_json
from qsurgeon.checkpoint.reading.gate import check_checkpoint
from qsurgeon.checkpoint.writing.journal import Entry
from qsurgeon.checkpoint.writing.layout import (
    MAX_SHARD_SIZE,
    Encoded,
    Job,
    Layout,
    Packing,
    copied,
    recoded,
    sharded,
    size_in_bytes,
)
from qsurgeon.checkpoint.writing.output import Output, files_of, hash_of, identities, kept, lead
from qsurgeon.checkpoint.writing.progress import Events
from qsurgeon.checkpoint.writing.staging import partial_of, refuse_inside, refuse_taken
from qsurgeon.errors import CheckpointError
from qsurgeon.exchange.dense import holds
from qsurgeon.exchange.encodings import Renamed, Values, reciprocal
from qsurgeon.exchange.exporting import REPORT
from qsurgeon.exchange.incoming import SECTIONS, Incoming, Weight, incoming
from qsurgeon.exchange.modelopt import CONFIG as MODELOPT_CONFIG
from qsurgeon.exchange.source import DIVISORS
from qsurgeon.layers import Quantization
from qsurgeon.places import expanded, is_id
from qsurgeon.storage import PACKED, Encoding
from qsurgeon.surgery import QUANT_METHOD
from qsurgeon.version import __version__


@dataclass(frozen=True)
class ImportOptions:
    """How an import is done; the output depends on ``dequantize`` and ``max_shard_size`` alone.

    dequantize: store values as master weights, in place of codes. The rest is as in ``ExportOptions``.
    """

    dequantize: bool = False
    workers: int | None = None
    max_shard_size: int | str | None = None
    resume: bool = False
    allow_nonfinite: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Imported:
    """What ``import_checkpoint`` did.

    method: by what the folder was quantized. modules: how each computes now. dropped: tensors that were left out.
    changed: how many values a master model rounds to others than its codes were of; None where codes stay codes, and
    for formats whose tensor scale is found anew.
    """

    source: str
    method: str
    storage: str
    modules: Mapping[str, Quantization]
    dropped: tuple[str, ...]
    changed: int | None
    summary: str

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-ready values."""
        modules = {name: {"weight": how.weight_name, "input": how.input_name} for name, how in self.modules.items()}
        return {**vars(self), "modules": modules, "dropped": list(self.dropped)}


def import_checkpoint(
    folder: str | Path,
    destination: str | Path,
    events: Events | None = None,
    options: ImportOptions = ImportOptions(),
) -> Imported:
    """Write ``destination``, which ``qsurgeon.load`` opens: what another tool quantized in ``folder``, with its codes.

    The weights become packed ones, trainable with LoRA, with the codes and scales that they have; ``dequantize`` makes
    their values master weights. Inputs are rounded as the checkpoint asks for. What ``export`` wrote comes back under
    the formats and rules that it had. Memory is bounded, and what is interrupted resumes, as in ``export``.

    ``folder`` may also be the id of a model on the hub.

    Raises: ExchangeError for what nothing here computes; CheckpointError; OSError. There is no ``destination`` then.
    """
    source, destination = Path(expanded(folder)), Path(os.path.normpath(expanded(destination)))
    if not source.exists() and is_id(str(folder)):
        source = fetch(str(folder), trust_remote_code=options.trust_remote_code).folder
    if not source.is_dir():
        raise CheckpointError(f"{source}: {'is a file; expected a folder' if source.exists() else 'no such folder'}")
    refuse_inside(destination, source)
    refuse_taken(destination)
    if options.resume and not partial_of(destination).is_dir():
        raise CheckpointError(f"there is nothing to resume: no {partial_of(destination)}")
    size = MAX_SHARD_SIZE if options.max_shard_size is None else options.max_shard_size
    size_in_bytes(size)
    work = incoming(source, dequantize=options.dequantize, trust_remote_code=options.trust_remote_code)
    output = Output(
        source,
        destination,
        Layout(sharded(list(_jobs(work)), size)),
        sum((source / one).stat().st_size for one in companions(source)),
        lambda: _run(work, options),
        tuple(f"{name} and its like are left out: nothing here caches in 8 bits" for name in work.dropped[:1]),
        options.workers,
        options.allow_nonfinite,
    )
    counts: list[float] = []

    def finish(written: Path, entries: Mapping[str, Entry]) -> None:
        if not work.encodes:
            counts.extend(one.beside for one in entries.values() if one.beside is not None)
        _finish(work, written, options)

    with kept(destination):
        lead(output, events or Events(), finish)
    changed = int(sum(counts)) if len(counts) == len(work.weights) else None
    hows = work.record.quantizations()
    return Imported(str(source), work.method, work.record.storage, hows, work.dropped, changed, work.summary)


def _jobs(work: Incoming) -> Iterator[Job]:
    """Yield what is written, in the order of the source."""
    first = {next(iter(one.foreign.tensors.values())).name: one for one in work.weights}
    others = {
        tensor.name for one in work.weights for tensor in (*one.foreign.tensors.values(), *one.foreign.beside)
    } | set(work.dropped)
    for name, tensor in work.tensors.items():
        if name in first:
            yield _job(first[name], work)
        elif name not in others:
            yield copied(tensor)


def _job(one: Weight, work: Incoming) -> Job:
    foreign, format = one.foreign, one.format
    packing = Packing(format, _exact(one, work))
    encoded = Encoded(packing, foreign.tensors, foreign.rows, foreign.columns, work.dtype)
    return recoded(one.name, encoded, PACKED if work.encodes else _values(one, work.dtype))


def _exact(one: Weight, work: Incoming) -> Renamed:
    """Return how a weight is stored, with the tensor scale that an export kept, where the divisor lost bits of it."""
    encoding, scale = one.foreign.encoding, work.scales.get(one.foreign.stem)
    above = encoding.above
    if scale is None or above is None or not above.divides:
        return encoding
    return replace(encoding, exact=(scale, reciprocal(scale)))


def _values(one: Weight, dtype: torch.dtype) -> Encoding:
    format = one.how.weight
    assert format is not None
    own = dtype if holds(dtype, one.format) else torch.float32
    again = None if format.as_weight.tensor_scale == "tensor" else format.as_weight
    return Values(own, again=again)


def _run(work: Incoming, options: ImportOptions) -> dict[str, Any]:
    """Return what the bytes of an import depend on."""
    report = work.folder / REPORT
    return {
        "qsurgeon": __version__,
        "import": work.method,
        "--dequantize": options.dequantize,
        "--max-shard-size": options.max_shard_size,
        "the source's": {
            "config.json": hash_of((work.folder / "config.json").read_bytes()),
            REPORT: hash_of(report.read_bytes()) if report.is_file() else None,
            **identities(files_of(work.tensors)),
        },
    }


def _finish(work: Incoming, folder: Path, options: ImportOptions) -> None:
    """Write all but the weights, and see that the whole can be loaded."""
    for name in (REPORT, MODELOPT_CONFIG):
        (folder / name).unlink(missing_ok=True)
    divisors = {
        f"{one.foreign.stem}.{key}": number for one in work.weights for key, number in one.foreign.exact.items()
    }
    lost = {name: number for name, number in divisors.items() if not _is_kept(name, work)}
    if lost:
        write_json(folder / DIVISORS, {"divisors": lost})
    card = folder / CARD
    text = without_record(card.read_text("utf-8")) if card.is_file() else ""
    card.write_text(with_record(text, work.record, work.summary), "utf-8")
    config = {key: value for key, value in work.config.items() if key not in SECTIONS}
    section = {"quant_method": QUANT_METHOD, **work.record.to_dict()}
    write_json(folder / "config.json", {**config, "quantization_config": section})
    check_checkpoint(folder, trust_remote_code=options.trust_remote_code)


def _is_kept(name: str, work: Incoming) -> bool:
    """Return whether the export that a divisor is of kept the factor, whose reciprocal it is."""
    stem = name.rpartition(".")[0]
    return stem in work.scales and not name.endswith("input_global_scale")
