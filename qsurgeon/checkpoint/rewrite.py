"""Rewrite one folder into another: the only place that changes stored tensors.

With ``storage: master`` no weight changes: config.json gets the record and the files are copied. They are not hard
links, because safetensors writes files in place: saving a trained model over a link would change the source. With
``storage: packed`` the weights that the plan wraps become codes and scales.
"""

import datetime
import errno
import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from qsurgeon.arguments import check_path, check_recipe
from qsurgeon.checkpoint.card import with_record
from qsurgeon.checkpoint.card.front_matter import CARD
from qsurgeon.checkpoint.hub import fetch, fetch_config
from qsurgeon.checkpoint.reading.files import INDEX, companions, copy_companions, write_json
from qsurgeon.checkpoint.reading.gate import check_generation, check_tensors
from qsurgeon.checkpoint.reading.headers import Tensor
from qsurgeon.checkpoint.reading.index import read_headers
from qsurgeon.checkpoint.reading.naming import Names, names_in
from qsurgeon.checkpoint.writing import journal
from qsurgeon.checkpoint.writing.jobs import layout_of
from qsurgeon.checkpoint.writing.layout import Layout, size_in_bytes
from qsurgeon.checkpoint.writing.progress import Estimate, Events
from qsurgeon.checkpoint.writing.ranks import Ranks, ranks
from qsurgeon.checkpoint.writing.staging import partial_of, refuse_inside, refuse_taken, staged
from qsurgeon.checkpoint.writing.stream import SLAB, Stream
from qsurgeon.errors import CheckpointError, OtherRankError, in_words
from qsurgeon.places import expanded, model_here
from qsurgeon.reading import MOST_JSON, read_json, read_regular
from qsurgeon.recipe import Recipe, load_recipe
from qsurgeon.surgery import (
    QUANT_METHOD,
    Plan,
    is_ours,
    plan_for,
    read_config,
    read_record,
    record_of,
    refuse_foreign,
    repacked,
    skeleton,
)
from qsurgeon.version import __version__

SLABS = 8  # that a thread holds at once, with what is made of one in between


@dataclass(frozen=True)
class Options:
    """How a rewrite is done; the output depends on ``max_shard_size`` alone.

    workers: threads, None for one a core. max_shard_size: of each file, in bytes or as "5GB"; None keeps files that do
    not change, and means 5GB for others. resume: there must be an unfinished output to go on with; without it one is
    gone on with too, where there is one. allow_nonfinite: write NaN and infinity as well.
    shared: this is one of the processes that torchrun or accelerate launch started, all of which call ``rewrite``.
    revision: of a model on the hub: a branch, a tag or a commit. trust_remote_code: run the code that a model brings.
    """

    workers: int | None = None
    max_shard_size: int | str | None = None
    resume: bool = False
    allow_nonfinite: bool = False
    shared: bool = False
    revision: str | None = None
    trust_remote_code: bool = False


def rewrite(
    recipe: Recipe | str | Path,
    source: str | Path = "",
    destination: str | Path = "",
    events: Events | None = None,
    options: Options = Options(),
) -> Plan:
    """Write ``destination``, a folder that ``from_pretrained`` opens as ``source`` with ``recipe`` applied.

    ``source``: a folder, or the id of a model on the hub, whose files are downloaded into the cache.

    Beside the weights lie recipe.yaml, qsurgeon-plan.json (every module's fate, and the versions) and a model
    card. Memory is bounded, whatever the size of the checkpoint. What is interrupted leaves
    ``destination.partial``, from which the same call goes on to the same bytes.

    Raises: RecipeError, PlanError, CheckpointError; and OSError for what the machine does not give. ``destination``
    does not exist then, and ``source`` is as it was. A KeyboardInterrupt says what is kept.
    """
    check_recipe("rewrite", recipe, Recipe, (source,))
    check_path("rewrite", source, "source")
    check_path("rewrite", destination, "destination")
    events = events or Events()
    here = ranks() if options.shared else Ranks()
    destination = Path(os.path.normpath(expanded(destination)))
    try:
        work = _prepare(recipe, source, destination, events, options) if here.rank == 0 else None
    except BaseException:
        here.share(False)
        raise
    if not here.share(True):
        raise OtherRankError("rank 0 could not begin")
    if work is None:
        work = _prepare(recipe, source, destination, events, options)
    try:
        if here.rank:
            _fill(work, here, events, options)
        else:
            _lead(work, here, events, options)
    except OSError as error:
        raise OSError(error.errno, f"{in_words(error)}{_kept(destination)}") from error
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(_kept(destination) or "; nothing was written") from stop
    return work.plan


@dataclass(frozen=True)
class _Work:
    """What there is to do, and what of: enough to tell another run from this one.

    beside: bytes of what is copied and is no weight of ours.
    """

    plan: Plan
    source: Path
    origin: str
    destination: Path
    config: dict[str, Any]
    card: str
    tensors: Mapping[str, Tensor]
    layout: Layout
    beside: int
    names: Names
    run: dict[str, Any]


def _prepare(
    recipe: Recipe | str | Path, source: str | Path, destination: Path, events: Events, options: Options
) -> _Work:
    """Find out all that can be wrong before anything is written."""
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    source = model_here(source) or source
    if Path(source).is_file():
        raise CheckpointError(f"{source}: is a file; expected a folder")
    if Path(source).is_dir():
        refuse_inside(destination, Path(source))
    refuse_taken(destination)
    if options.resume and not partial_of(destination).is_dir():
        raise CheckpointError(f"there is nothing to resume: no {partial_of(destination)}")
    if options.max_shard_size is not None:
        size_in_bytes(options.max_shard_size)
    # What does not fit is found before weights are downloaded.
    trusted = options.trust_remote_code
    found = fetch_config(source, options.revision, trust_remote_code=trusted)
    config = read_json(found.folder / "config.json")
    refuse_foreign(config, str(source))
    own = config.get("quantization_config")
    record = read_record(own, "config.json") if isinstance(own, dict) and is_ours(own) else None
    model = skeleton(read_config(found.folder, trusted), trusted)
    plan = plan_for(recipe, model)
    plan = plan if record is None else repacked(plan, record, str(source))
    events.ready()
    # By the commit: a branch may have moved since.
    whole = fetch(source, found.commit, trust_remote_code=trusted)
    folder = whole.folder
    origin = whole.origin if record is None else record.source or whole.origin
    tensors = read_headers(folder)
    names = names_in(model, tensors)
    layout = layout_of(plan, model, tensors, names, folder, options.max_shard_size)
    check_tensors(model, tensors, names)
    check_generation(folder)
    run = _run(plan, tensors, folder, options)
    card = with_record(_text(folder / CARD), record_of(plan, __version__, origin), plan.summary)
    beside = sum((folder / one).stat().st_size for one in companions(folder))
    return _Work(plan, folder, origin, destination, config, card, tensors, layout, beside, names, run)


def _text(file: Path) -> str:
    try:
        return read_regular(file, MOST_JSON).decode("utf-8") if file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read as text: {error}") from error


def _run(plan: Plan, tensors: Mapping[str, Tensor], source: Path, options: Options) -> dict[str, Any]:
    """Return what the bytes of an output depend on."""
    return {
        "qsurgeon": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "the recipe": plan.recipe.text,
        "the plan": _hash(record_of(plan, __version__).model_dump_json().encode()),
        "--max-shard-size": options.max_shard_size,
        "the source's": {
            "config.json": _hash((source / "config.json").read_bytes()),
            **{file.name: _identity(file) for file in sorted({tensor.file for tensor in tensors.values()})},
        },
    }


def _identity(file: Path) -> dict[str, Any]:
    found = file.stat()
    when = datetime.datetime.fromtimestamp(found.st_mtime_ns // 10**9, datetime.UTC)
    return {"size": found.st_size, "date": f"{when:%Y-%m-%d %H:%M:%S}.{found.st_mtime_ns % 10**9:09} UTC"}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _lead(work: _Work, here: Ranks, events: Events, options: Options) -> None:
    """Do rank 0's part: its own files, and all that there is one of."""
    with staged(work.destination, resumable=True) as folder:
        partial = partial_of(work.destination)
        resumed = journal.begin(partial, work.run)
        done = journal.entries(partial)
        _check_space(work, folder)
        if resumed:
            events.note(
                f"{partial} is an unfinished run of this: {len(done)} of {len(work.layout.jobs)} tensors are done"
            )
        for remark in work.plan.remarks:
            events.note(remark)
        if unknown := work.names.unknown:
            events.note(
                f"{len(unknown)} tensors that the model has no place for are copied as they are, such as {unknown[0]}"
            )
        _fill(work, here, events, options)
        _finish(work, folder, options)


def _fill(work: _Work, here: Ranks, events: Events, options: Options) -> None:
    """Write this process's files, between two waits: until there is a folder, and until all files are whole."""
    here.wait()
    shards = here.mine(work.layout.shards)
    workers = options.workers or _cores()
    partial = partial_of(work.destination)
    done = journal.entries(partial)
    layout = Layout(shards)
    events.begin(Estimate(layout.read, layout.written, len(shards), _memory(layout, workers)))
    own = journal.Journal(partial, here.rank)
    try:
        Stream(partial / work.destination.name, own, events, workers).run(shards, done)
    finally:
        own.close()
    here.wait()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory(layout: Layout, workers: int) -> int:
    return workers * (SLABS * SLAB + max((job.held for job in layout.jobs.values()), default=0))


def _check_space(work: _Work, folder: Path) -> None:
    there = sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
    needed, free = work.layout.written + work.beside - there, shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{folder}: {needed / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free")


def _finish(work: _Work, folder: Path, options: Options) -> None:
    """Write all but the weights, which are there. Raises: CheckpointError if they should not be."""
    entries = journal.entries(partial_of(work.destination))
    missing = [name for name in work.layout.jobs if name not in entries]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors were not written, such as {missing[0]}")
    broken = [job.source.name for name, job in work.layout.jobs.items() if not entries[name].finite]
    if broken and not options.allow_nonfinite:
        names = ", ".join(broken[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
        raise CheckpointError(
            f"{work.source} has NaN or infinity in {names}. With --allow-nonfinite they are written all the same"
            f"{_kept(work.destination)}"
        )
    if _run(work.plan, work.tensors, work.source, options) != work.run:
        raise CheckpointError(f"{work.source} changed while it was read")
    copy_companions(work.source, folder)
    _write_index(work, folder)
    plan, config = work.plan, dict(work.config)
    if any(step.module.tied_to for step in plan.wrapped):
        _untie(config)
    record = {"quant_method": QUANT_METHOD, **record_of(plan, __version__, work.origin).to_dict()}
    encoding = plan.recipe.encoding
    config["quantization_config"] = record if encoding is None else encoding.section(record)
    write_json(folder / "qsurgeon-plan.json", _plan_json(plan, work.origin))
    (folder / "recipe.yaml").write_text(plan.recipe.text, "utf-8")
    (folder / CARD).write_text(work.card, "utf-8")
    write_json(folder / "config.json", config)  # the last, so that nothing before looks like a model


def _write_index(work: _Work, folder: Path) -> None:
    weight_map = work.layout.weight_map
    there = work.source / INDEX
    index = read_json(there) if there.is_file() else {}
    if index.get("weight_map") == weight_map and isinstance(index.get("metadata"), dict):
        shutil.copyfile(there, folder / INDEX)
    elif len(work.layout.shards) > 1:
        size = sum(job.size for job in work.layout.jobs.values())
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _untie(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = False
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = config["text_config"] | {"tie_word_embeddings": False}


def _plan_json(plan: Plan, origin: str) -> dict[str, Any]:
    versions = {"qsurgeon": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    steps = [{"module": step.module.name, "why": step.why} for step in plan.steps if step.why]
    return {"source": origin, "versions": versions, "modules": steps}


def _kept(destination: Path) -> str:
    """Return the end of an error message: that another run need not do everything again."""
    partial = partial_of(destination)
    return f"; finished work is kept in {partial}, and the same command resumes it" if partial.is_dir() else ""
