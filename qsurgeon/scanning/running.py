"""A scan from its arguments to its result: what is scanned, in which order, and what is kept of an interrupted one."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from qsurgeon.arguments import check_model, check_recipe
from qsurgeon.checkpoint import Estimate, Events, fetch, fetch_config, read_headers
from qsurgeon.checkpoint.reading.gate import check_tensors
from qsurgeon.checkpoint.reading.naming import names_in
from qsurgeon.errors import CheckpointError, SurgeryError
from qsurgeon.formats import Format
from qsurgeon.layers import quant_layers
from qsurgeon.reading import read_json
from qsurgeon.recipe import Recipe, load_recipe
from qsurgeon.scanning.choices import choices_of
from qsurgeon.scanning.result import Row, Scan
from qsurgeon.scanning.stored import Weights
from qsurgeon.scanning.unfinished import Unfinished
from qsurgeon.scanning.weighing import weigh
from qsurgeon.surgery import Plan, build_plan, is_ours, modules_of, plain_model, read_config, refuse_foreign, skeleton
from qsurgeon.version import __version__


@dataclass(frozen=True)
class Opened:
    """What is scanned: a plan of a model, where its weights are, and what tells it from another.

    source: what the result calls it. identity: of its files. load: returns the live model, to be run on data.
    """

    plan: Plan
    weights: Weights
    source: str
    identity: Mapping[str, Any]
    load: Callable[[], nn.Module]


def scan(
    recipe: Recipe | str | Path,
    model: Any,
    *,
    formats: Sequence[str] = (),
    output: str | Path | None = None,
    events: Events | None = None,
    workers: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Scan:
    """Measure what the formats of ``recipe``, and ``formats`` in their place, do to each module that it wraps.

    ``model``: a live one, a folder or a hub id. ``output``: a file for the result, as JSON; what an interruption leaves
    beside it is gone on with. ``workers``: threads.

    Raises: RecipeError, PlanError, CheckpointError, FormatError; SurgeryError for a live model that is wrapped.
    """
    check_recipe("scan", recipe, Recipe, (model,))
    check_model("scan", model)
    made = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    others = [made.format(name) for name in dict.fromkeys(formats)]
    opened = _live(made, model) if isinstance(model, nn.Module) else _stored(made, model, revision, trust_remote_code)
    rows = _rows(opened.plan, others)
    events = events or Events()
    unfinished = Unfinished(None if output is None else Path(output), _run(opened, others))
    try:
        if unfinished.resumed:
            events.note(f"{unfinished.folder} is an unfinished run of this: {unfinished.count} parts are done")
        sizes = {row.module: row.step.module.weight_bytes for row in rows}
        read = sum(sizes.values())
        events.begin(Estimate(read, 0, 0, 0))
        rows = weigh(rows, opened.weights, unfinished, events, workers or _cores())
        found = Scan(opened.plan, opened.source, tuple(rows))
        unfinished.finish(found.to_json())
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(unfinished.kept) from stop
    finally:
        unfinished.close()
    return found


def _rows(plan: Plan, formats: Sequence[Format]) -> list[Row]:
    choices = choices_of(plan, formats)
    return [Row(step, name, choice) for step in plan.wrapped for name, choice in choices[step.module.name].items()]


def _live(recipe: Recipe, model: nn.Module) -> Opened:
    """Return a live model as it is scanned. Raises: SurgeryError for one that is wrapped."""
    wrapped = quant_layers(model)
    if wrapped:
        raise SurgeryError(f"{next(iter(wrapped))} is wrapped already; scan the model before a recipe is applied to it")
    plan = build_plan(recipe, modules_of(model))
    name = type(plain_model(model)[1]).__name__
    return Opened(plan, Weights(model, {}), name, {"model": name}, lambda: model)


def _stored(recipe: Recipe, model: str | Path, revision: str | None, trusted: bool) -> Opened:
    """Return a checkpoint as it is scanned: nothing but its headers is read yet.

    Raises: CheckpointError for one that is quantized, by qsurgeon too.
    """
    found = fetch_config(model, revision, trust_remote_code=trusted)
    config = read_json(found.folder / "config.json")
    refuse_foreign(config, str(model))
    own = config.get("quantization_config")
    if isinstance(own, dict) and is_ours(own):
        raise CheckpointError(f"{model} was rewritten by qsurgeon; scan the checkpoint that it was made from")
    bare = skeleton(read_config(found.folder, trusted), trusted)
    plan = build_plan(recipe, modules_of(bare))
    whole = fetch(model, found.commit, trust_remote_code=trusted)
    tensors = read_headers(whole.folder)
    names = names_in(bare, tensors)
    check_tensors(bare, tensors, names)
    files = sorted({tensor.file for tensor in tensors.values()})
    identity = {
        "config.json": hashlib.sha256((whole.folder / "config.json").read_bytes()).hexdigest(),
        **{file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
    }
    return Opened(plan, Weights(bare, tensors, names), whole.origin, identity, lambda: bare)


def _run(opened: Opened, formats: Sequence[Format]) -> dict[str, Any]:
    """Return what the numbers of a scan depend on."""
    return {
        "qsurgeon": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "the recipe": opened.plan.recipe.text,
        "--formats": ", ".join(format.name for format in formats) or None,
        "the model's": dict(opened.identity),
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
