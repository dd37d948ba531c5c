"""Export a folder that qsurgeon wrote to the checkpoints of other tools: rounded once, or with the codes it has."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsurgeon.checkpoint.card import without_record
from qsurgeon.checkpoint.card.front_matter import CARD
from qsurgeon.checkpoint.reading.files import companions, write_json
from qsurgeon.checkpoint.writing.journal import Entry
from qsurgeon.checkpoint.writing.layout import (
    MAX_SHARD_SIZE,
    Encoded,
    Job,
    Layout,
    Packing,
    copied,
    given,
    packed,
    recoded,
    sharded,
    size_in_bytes,
)
from qsurgeon.checkpoint.writing.output import Output, files_of, hash_of, identities, kept, lead
from qsurgeon.checkpoint.writing.progress import Events
from qsurgeon.checkpoint.writing.staging import partial_of, refuse_inside, refuse_taken
from qsurgeon.errors import CheckpointError, ExchangeError, nearest
from qsurgeon.exchange.compressed_tensors import CompressedTensors
from qsurgeon.exchange.dense import Dense
from qsurgeon.exchange.engines import Computed, check_engine, computed, fuses
from qsurgeon.exchange.fused import disagreeing
from qsurgeon.exchange.modelopt import ModelOpt
from qsurgeon.exchange.source import Source, opened
from qsurgeon.exchange.target import Exported, Target
from qsurgeon.places import expanded
from qsurgeon.surgery import QUANT_METHOD
from qsurgeon.version import __version__

TARGETS: dict[str, Target] = {target.name: target for target in (CompressedTensors(), ModelOpt(), Dense())}
REPORT = "qsurgeon-export.json"
PLAN = "qsurgeon-plan.json"


@dataclass(frozen=True)
class Export:
    """What ``export`` did.

    to: the target. schemes: how many modules have which weight and input. rounded: how many weights were rounded, once;
    kept: how many were codes already. computed: what each engine computes with it. disagree: groups of modules that
    engines join, and whose tensor scales differ.
    """

    source: str
    to: str
    schemes: Mapping[tuple[str, str], int]
    rounded: int
    kept: int
    computed: tuple[Computed, ...]
    disagree: tuple[tuple[str, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON-ready values."""
        return {
            "source": self.source,
            "to": self.to,
            "schemes": [{"weight": one, "input": asked, "modules": n} for (one, asked), n in self.schemes.items()],
            "rounded": self.rounded,
            "kept": self.kept,
            "computed": [one.to_dict() for one in self.computed],
            "disagree": [list(names) for names in self.disagree],
        }


@dataclass(frozen=True)
class ExportOptions:
    """How an export is done; the output depends on ``weight_only`` and ``max_shard_size`` alone.

    weight_only: ask for inputs in full precision, whatever the model was trained with. workers: threads, None for one a
    core. max_shard_size: of each file. resume: there must be an unfinished export to go on with. allow_nonfinite: write
    NaN and infinity as well.
    trust_remote_code: run the code that a model brings.
    """

    weight_only: bool = False
    workers: int | None = None
    max_shard_size: int | str | None = None
    resume: bool = False
    allow_nonfinite: bool = False
    trust_remote_code: bool = False


def export(
    folder: str | Path,
    destination: str | Path,
    to: str,
    engine: str | None = None,
    events: Events | None = None,
    options: ExportOptions = ExportOptions(),
) -> Export:
    """Write ``destination``: the model in ``folder``, which qsurgeon wrote, as a checkpoint of another tool.

    to: ``compressed-tensors``, ``modelopt``, ``dense`` (values in full precision). engine: what will serve it, see
    ``engines``; one that refuses such files, or would compute with wrong scales, is an error.

    A master weight is rounded here, once, to what it was rounded to in training; packed codes and scales are stored as
    they are. Memory is bounded, whatever the size. What is interrupted leaves ``destination.partial``, from which the
    same call goes on to the same bytes. Beside the weights lies qsurgeon-export.json, which ``import`` reads.

    Raises: ExchangeError for what the target cannot hold; CheckpointError; OSError. There is no ``destination`` then.
    """
    folder, destination = expanded(folder), Path(os.path.normpath(expanded(destination)))
    if to not in TARGETS:
        raise ExchangeError(f"nothing is exported to '{to}'; {nearest(to, TARGETS)}")
    check_engine(engine, to)
    if not Path(folder).is_dir():
        raise CheckpointError(
            f"{folder}: {'is a file; expected a folder' if Path(folder).exists() else 'no such folder'}"
        )
    refuse_inside(destination, Path(folder))
    refuse_taken(destination)
    if options.resume and not partial_of(destination).is_dir():
        raise CheckpointError(f"there is nothing to resume: no {partial_of(destination)}")
    source = opened(Path(folder), trust_remote_code=options.trust_remote_code)
    work = _work(source, TARGETS[to], engine, options)
    told = tuple(computed(to, work.exported, engine))
    output = Output(
        Path(folder),
        destination,
        Layout(sharded(_jobs(work), _size(options))),
        sum((Path(folder) / one).stat().st_size for one in companions(Path(folder))),
        lambda: _run(source, to, options),
        workers=options.workers,
        allow_nonfinite=options.allow_nonfinite,
    )
    done: list[Export] = []

    def finish(written: Path, entries: Mapping[str, Entry]) -> None:
        done.append(_finish(work, told, written, entries))

    with kept(destination):
        lead(output, events or Events(), finish)
    return done[0]


@dataclass(frozen=True)
class _Work:
    source: Source
    target: Target
    exported: tuple[Exported, ...]
    engine: str | None
    files: Mapping[str, Any]


def _work(source: Source, target: Target, engine: str | None, options: ExportOptions) -> _Work:
    exported = _exported(source, target, options)
    return _Work(source, target, exported, engine, target.files(source.config, exported, source.plain))


def _size(options: ExportOptions) -> int | str:
    size = MAX_SHARD_SIZE if options.max_shard_size is None else options.max_shard_size
    size_in_bytes(size)
    return size


def _exported(source: Source, target: Target, options: ExportOptions) -> tuple[Exported, ...]:
    """Return what each wrapped weight becomes."""
    found = []
    for one in source.wrapped:
        if one.stored is None and target.name == Dense.name:
            continue  # an input alone was rounded: the weight stays as it is
        if one.how.behavior.phases != "both":
            raise ExchangeError(
                f"{one.module.name} is rounded in {one.how.behavior.phases} only; a file is the same in all phases"
            )
        for role, format in (("weight", one.how.weight), ("input", one.how.input)):
            if format is not None and format.tensor_scale == "static" and format.static_scale is None:
                if role == "input" and (options.weight_only or target.name == Dense.name):
                    continue
                raise ExchangeError(
                    f"{one.module.name}: the {role}'s static scale has no number: call qsurgeon.calibrate(model, "
                    "batches), and save the model"
                )
        scheme = target.scheme(one, weight_only=options.weight_only)
        found.append(Exported(one, target.exact(one, scheme, source.divisors)))
    if not found:
        raise ExchangeError(f"{source.folder}: no weight is wrapped; it is in full precision already")
    return tuple(found)


def _jobs(work: _Work) -> list[Job]:
    """Return what is written, in the order of the source; what replaces a weight stands where its first tensor was."""
    replaced: dict[str, Exported | None] = {}
    for one in work.exported:
        first, *others = one.source.tensors
        replaced |= {first.name: one} | dict.fromkeys((tensor.name for tensor in others), None)
    jobs: list[Job] = []
    for name, tensor in work.source.tensors.items():
        becomes = replaced.get(name)
        if becomes is not None:
            jobs += _jobs_of(becomes)
        elif name not in replaced:
            jobs.append(copied(tensor))
    return jobs


def _jobs_of(one: Exported) -> list[Job]:
    source, encoding = one.source, one.scheme.encoding
    if isinstance(source.stored, Encoded):
        jobs = [recoded(source.name, source.stored, encoding)]
    else:
        assert source.how.weight is not None
        packing = Packing(source.how.weight.as_weight, encoding)
        jobs = [packed(source.tensors[0], packing, source.name, source.module.declared)]
    return jobs + [given(f"{source.stem}.{key}", value) for key, value in one.scheme.beside.items()]


def _run(source: Source, to: str, options: ExportOptions) -> dict[str, Any]:
    """Return what the bytes of an export depend on."""
    return {
        "qsurgeon": __version__,
        "--to": to,
        "--weight-only": options.weight_only,
        "--max-shard-size": options.max_shard_size,
        "the source's": {
            "config.json": hash_of((source.folder / "config.json").read_bytes()),
            **identities(files_of(source.tensors)),
        },
    }


def _finish(work: _Work, told: tuple[Computed, ...], folder: Path, entries: Mapping[str, Entry]) -> Export:
    """Write all but the weights, and return what was done."""
    source, target = work.source, work.target
    scales = _tensor_scales(work, entries)
    disagree = tuple(tuple(names) for names in disagreeing(scales))
    told = tuple(_largest(one) if disagree and fuses(one.engine) else one for one in told)
    if disagree and work.engine is not None and fuses(work.engine):
        raise ExchangeError(
            f"{' and '.join(disagree[0])} have tensor scales of their own, and {work.engine} takes the largest for "
            f"all of them: their weights would be others ({len(disagree)} such groups). Share the scales before "
            "training: qsurgeon.share_scales(model)"
        )
    schemes: dict[tuple[str, str], int] = {}
    for one in work.exported:
        key = one.scheme.weight, one.scheme.input
        schemes[key] = schemes.get(key, 0) + 1
    encoded = sum(isinstance(one.source.stored, Encoded) for one in work.exported)
    done = Export(str(source.folder), target.name, schemes, len(work.exported) - encoded, encoded, told, disagree)
    card = folder / CARD
    if card.is_file():
        card.write_text(without_record(card.read_text("utf-8")), "utf-8")
    (folder / PLAN).unlink(missing_ok=True)
    section = work.files["config.json"].get("quantization_config")
    record = {"quant_method": QUANT_METHOD, **source.record.to_dict()}
    beside = {"qsurgeon": __version__, "config": digest(section), "record": record, "tensor_scales": scales}
    write_json(folder / REPORT, {**done.to_dict(), **beside})
    for name, data in sorted(work.files.items(), key=lambda one: one[0] == "config.json"):
        write_json(folder / name, data)
    return done


def _largest(one: Computed) -> Computed:
    """Return what an engine computes that takes the largest of several tensor scales for all of them."""
    return replace(
        one, same=False, why="; ".join(filter(None, [one.why, "joined weights get the largest tensor scale"]))
    )


def digest(section: Any) -> str:
    """Return what tells the ``quantization_config`` that an export wrote from another."""
    return hashlib.sha256(json.dumps(section, sort_keys=True).encode()).hexdigest()


def _tensor_scales(work: _Work, entries: Mapping[str, Entry]) -> dict[str, float]:
    """Return the tensor scale of each weight that has one, by its module's name in the checkpoint."""
    first = {one.source.stem: f"{one.source.stem}.{_first(one)}" for one in work.exported}
    found = {stem: entries[name].beside for stem, name in first.items()}
    return {stem: number for stem, number in found.items() if number is not None}


def _first(one: Exported) -> str:
    """Return the name, in its module, of the tensor that the job of a weight is called after."""
    format = one.source.how.weight
    assert format is not None
    return next(iter(one.scheme.encoding.names(format.as_weight)))
