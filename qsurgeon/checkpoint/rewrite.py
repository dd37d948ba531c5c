"""Rewrite one folder into another: the only place that changes stored tensors.

With ``storage: master`` no weight changes: config.json gets the record and the files are copied. They are not hard
links, because safetensors writes files in place: saving a trained model over a link would change the source. With
``storage: packed`` the weights that the plan wraps become codes and scales.
"""

import os
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
from qsurgeon.checkpoint.reading.files import companions, write_json
from qsurgeon.checkpoint.reading.gate import check_generation, check_tensors
from qsurgeon.checkpoint.reading.headers import Tensor
from qsurgeon.checkpoint.reading.index import read_headers
from qsurgeon.checkpoint.reading.naming import Names, names_in
from qsurgeon.checkpoint.writing.jobs import layout_of
from qsurgeon.checkpoint.writing.layout import size_in_bytes
from qsurgeon.checkpoint.writing.output import Output, files_of, fill, hash_of, identities, kept, lead
from qsurgeon.checkpoint.writing.progress import Events
from qsurgeon.checkpoint.writing.ranks import Ranks, ranks
from qsurgeon.checkpoint.writing.staging import partial_of, refuse_inside, refuse_taken
from qsurgeon.errors import CheckpointError, OtherRankError
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
    with kept(destination):
        if here.rank:
            fill(work.output, events, here)
        else:
            lead(work.output, events, lambda folder, _: _finish(work, folder), here)
    return work.plan


@dataclass(frozen=True)
class _Work:
    """What there is to do, and what of."""

    plan: Plan
    origin: str
    config: dict[str, Any]
    card: str
    output: Output


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
    card = with_record(_text(folder / CARD), record_of(plan, __version__, origin), plan.summary)
    beside = sum((folder / one).stat().st_size for one in companions(folder))
    output = Output(
        folder,
        destination,
        layout,
        beside,
        lambda: _run(plan, tensors, folder, options),
        (*plan.remarks, *unknown_note(names)),
        options.workers,
        options.allow_nonfinite,
    )
    return _Work(plan, origin, config, card, output)


def unknown_note(names: Names) -> tuple[str, ...]:
    """Return what to say of tensors that the model has no place for, if there are any."""
    if not names.unknown:
        return ()
    return (
        f"{len(names.unknown)} tensors that the model has no place for are copied as they are, such as "
        f"{names.unknown[0]}",
    )


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
        "the plan": hash_of(record_of(plan, __version__).model_dump_json().encode()),
        "--max-shard-size": options.max_shard_size,
        "the source's": {
            "config.json": hash_of((source / "config.json").read_bytes()),
            **identities(files_of(tensors)),
        },
    }


def _finish(work: _Work, folder: Path) -> None:
    """Write all but the weights, which are there."""
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


def _untie(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = False
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = config["text_config"] | {"tie_word_embeddings": False}


def _plan_json(plan: Plan, origin: str) -> dict[str, Any]:
    versions = {"qsurgeon": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    steps = [{"module": step.module.name, "why": step.why} for step in plan.steps if step.why]
    return {"source": origin, "versions": versions, "modules": steps}
