"""A scan from its arguments to its result: what is scanned, in which order, and what is kept of an interrupted one."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from qsurgeon.errors import CalibrationError, CallError, CheckpointError, SurgeryError
from qsurgeon.formats import Format
from qsurgeon.layers import quant_layers
from qsurgeon.reading import read_json
from qsurgeon.recipe import Recipe, load_recipe
from qsurgeon.scanning.choices import choices_of
from qsurgeon.scanning.data import LENGTH, SAMPLES, Examples, from_rows, from_text, given
from qsurgeon.scanning.probing import Probe
from qsurgeon.scanning.result import Data, Row, Scan
from qsurgeon.scanning.srdd import srdd as run_srdd
from qsurgeon.scanning.stored import Weights
from qsurgeon.scanning.unfinished import Unfinished
from qsurgeon.scanning.weighing import weigh
from qsurgeon.surgery import (
    Plan,
    architecture,
    build_plan,
    is_ours,
    modules_of,
    plain_model,
    read_config,
    refuse_foreign,
    skeleton,
)
from qsurgeon.version import __version__


@dataclass(frozen=True)
class Opened:
    """What is scanned: a plan of a model, where its weights are, and what tells it from another.

    source: what the result calls it. identity: of its files. config: the model's. load: returns the live model, to be
    run on data. tokenizer: returns its tokenizer.
    """

    plan: Plan
    weights: Weights
    source: str
    identity: Mapping[str, Any]
    config: Any
    load: Callable[[], nn.Module]
    tokenizer: Callable[[], Any]


@dataclass(frozen=True)
class Options:
    """How a scan is done.

    data: a JSON Lines file, or batches; text: a file of text. samples, length: how many are taken of a file, of how
    many tokens at most. tokenizer: of a live model. formats: tried in the recipe's place. srdd: whether SRDD's scan is
    done too. output: a file for the result, as JSON. workers: threads, None for one a core. revision,
    trust_remote_code: as everywhere.
    """

    data: str | Path | Iterable[Mapping[str, Any]] | None = None
    text: str | Path | None = None
    samples: int = SAMPLES
    length: int = LENGTH
    tokenizer: Any = None
    formats: Sequence[str] = ()
    srdd: bool = False
    output: str | Path | None = None
    workers: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False


def scan(recipe: Recipe | str | Path, model: Any, options: Options = Options(), events: Events | None = None) -> Scan:
    """Measure what the formats of ``recipe`` do to each module that it wraps, and with data to the whole model.

    ``model``: a live one, a folder or a hub id. What an interruption leaves beside the output is gone on with.

    Raises: RecipeError, PlanError, CheckpointError, FormatError; SurgeryError for a live model that is wrapped;
    CalibrationError for data that cannot be used, CallError for options that do not go together.
    """
    check_recipe("scan", recipe, Recipe, (model,))
    check_model("scan", model)
    if options.data is not None and options.text is not None:
        raise CallError("qsurgeon.scan: data and text are both given; give one of them")
    if options.srdd and options.data is None and options.text is None:
        raise CallError("qsurgeon.scan: SRDD looks at what layers return: give it data or text")
    made = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    others = [made.format(name) for name in dict.fromkeys(options.formats)]
    opened = _live(made, model) if isinstance(model, nn.Module) else _stored(made, model, options)
    rows, examples, events = _rows(opened.plan, others), _examples(opened, options), events or Events()
    output = None if options.output is None else Path(options.output)
    unfinished = Unfinished(output, _run(opened, others, examples, options))
    try:
        if unfinished.resumed:
            events.note(f"{unfinished.folder} is an unfinished run of this: {unfinished.count} parts are done")
        found = _measured(opened, rows, examples, unfinished, events, options)
        unfinished.finish(found.to_json())
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(unfinished.kept) from stop
    finally:
        unfinished.close()
    return found


def _measured(
    opened: Opened,
    rows: Sequence[Row],
    examples: Examples | None,
    unfinished: Unfinished,
    events: Events,
    options: Options,
) -> Scan:
    """Return all that is found; ``events`` hears of each byte of a weight, and of each pass as of as many."""
    weight_bytes = sum({row.module: row.step.module.weight_bytes for row in rows}.values())
    passes = 0 if examples is None else Probe.passes(rows, examples) + options.srdd * len(examples.batches)
    events.begin(Estimate(weight_bytes * (1 + passes), 0, 0, 0))
    weighed = weigh(rows, opened.weights, unfinished, events, options.workers or _cores())
    if examples is None:
        return Scan(opened.plan, opened.source, tuple(weighed))
    if examples.cut:
        events.note(f"{examples.cut} of {examples.samples} samples were cut off at {_length(opened, options)} tokens")
    model = opened.load()
    probe = Probe(model, weighed, unfinished, events, weight_bytes)
    probed = probe.run(examples)
    never = sorted({row.step.module.name for row in probed if row.output is None})
    if never:
        events.note(f"{len(never)} modules are not called on this data, such as {never[0]}")
    sums = probe.probed
    data = Data(examples.source, examples.samples, examples.tokens, sums.distance)
    other = None
    if options.srdd:
        other = run_srdd(model, examples, opened.source, unfinished, lambda: events.advance(weight_bytes))
    return Scan(opened.plan, opened.source, tuple(probed), data, sums.plain, sums.every, other)


def _examples(opened: Opened, options: Options) -> Examples | None:
    """Return what the model is to be run on; None for a scan of weights alone."""
    file = options.text if options.data is None else options.data
    if file is None:
        return None
    if not isinstance(file, str | Path):
        return given(file)
    if getattr(opened.config, "is_encoder_decoder", False):
        raise CalibrationError(
            f"{opened.source} is an encoder and a decoder, which a file of text does not tell apart: give batches in "
            "Python, qsurgeon.scan(recipe, model, data=batches)"
        )
    tokenizer = opened.tokenizer() if options.tokenizer is None else options.tokenizer
    vocabulary = getattr(opened.config.get_text_config(), "vocab_size", 0)
    read = from_text if options.data is None else from_rows
    try:
        return read(Path(file), tokenizer, options.samples, _length(opened, options), vocabulary)
    except OSError as error:
        raise CalibrationError(f"{file}: cannot be read: {error.strerror}") from error


def _length(opened: Opened, options: Options) -> int:
    """Return how many tokens a sample has at most: no more than the model has places for."""
    return min(options.length, getattr(opened.config.get_text_config(), "max_position_embeddings", options.length))


def _rows(plan: Plan, formats: Sequence[Format]) -> list[Row]:
    choices = choices_of(plan, formats)
    return [Row(step, name, choice) for step in plan.wrapped for name, choice in choices[step.module.name].items()]


def _live(recipe: Recipe, model: nn.Module) -> Opened:
    """Return a live model as it is scanned. Raises: SurgeryError for one that is wrapped."""
    wrapped = quant_layers(model)
    if wrapped:
        raise SurgeryError(f"{next(iter(wrapped))} is wrapped already; scan the model before a recipe is applied to it")
    plan = build_plan(recipe, modules_of(model))
    inner = plain_model(model)[1]
    name = type(inner).__name__

    def tokenizer() -> Any:
        raise CallError("qsurgeon.scan: a live model does not say what its tokenizer is; pass tokenizer=")

    return Opened(
        plan, Weights(model, {}), name, {"model": name}, getattr(inner, "config", None), lambda: model, tokenizer
    )


def _stored(recipe: Recipe, model: str | Path, options: Options) -> Opened:
    """Return a checkpoint as it is scanned: nothing but its headers is read yet.

    Raises: CheckpointError for one that is quantized, by qsurgeon too.
    """
    trusted = options.trust_remote_code
    found = fetch_config(model, options.revision, trust_remote_code=trusted)
    raw = read_json(found.folder / "config.json")
    refuse_foreign(raw, str(model))
    own = raw.get("quantization_config")
    if isinstance(own, dict) and is_ours(own):
        raise CheckpointError(f"{model} was rewritten by qsurgeon; scan the checkpoint that it was made from")
    config = read_config(found.folder, trusted)
    bare = skeleton(config, trusted)
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

    def load() -> nn.Module:
        model_class = architecture(config, trusted) or transformers.AutoModel
        # In float32, whatever it is stored in: rounding to bfloat16 behind each layer would be measured with it.
        loaded: nn.Module = model_class.from_pretrained(whole.folder, dtype=torch.float32, trust_remote_code=trusted)
        return loaded

    def tokenizer() -> Any:
        try:
            return transformers.AutoTokenizer.from_pretrained(whole.folder, trust_remote_code=trusted)
        except (OSError, ValueError) as error:
            raise CalibrationError(
                f"{model} has no tokenizer that can be read: {' '.join(str(error).split())[:200]}"
            ) from error

    return Opened(plan, Weights(bare, tensors, names), whole.origin, identity, config, load, tokenizer)


def _run(opened: Opened, formats: Sequence[Format], examples: Examples | None, options: Options) -> dict[str, Any]:
    """Return what the numbers of a scan depend on."""
    return {
        "qsurgeon": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "the recipe": opened.plan.recipe.text,
        "--formats": ", ".join(format.name for format in formats) or None,
        "the data": None if examples is None else f"{examples.identity} {examples.samples} {examples.tokens}",
        "--srdd": options.srdd or None,
        "the model's": dict(opened.identity),
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
