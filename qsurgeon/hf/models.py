"""A recipe and a Hugging Face model: plan, apply, load, and the record in the model's config."""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import transformers
from torch import nn

from qsurgeon.arguments import check_model, check_path, check_recipe, live
from qsurgeon.checkpoint import BAD_ADAPTER, check_checkpoint, config_of, fetch, origin
from qsurgeon.errors import CheckpointError, NothingWrappedError, QSurgeonError, SurgeryError
from qsurgeon.exchange.direct import foreign_method_in, imported
from qsurgeon.exchange.readers import READERS
from qsurgeon.hf.opening import ADAPTER, FINDING, adapter_at, finding_in
from qsurgeon.hf.quantizer import hosts, note, register
from qsurgeon.hf.references import refuse_unloaded, remember
from qsurgeon.hf.rollouts import follow_rollouts
from qsurgeon.launch.announce import announce
from qsurgeon.layers import quant_layers
from qsurgeon.places import named
from qsurgeon.recipe import Recipe, load_recipe
from qsurgeon.surgery import (
    QUANT_METHOD,
    Excluded,
    Origin,
    Plan,
    Record,
    architecture,
    current_record,
    foreign_method,
    install,
    inventory,
    mark,
    operate,
    plain_model,
    plan_for,
    read_config,
    record_in,
    refuse_foreign,
    refuse_quantized,
    repacked,
    skeleton,
    uninterrupted,
    unwrapped,
)
from qsurgeon.transformers_private.loading import (
    FINDS_TRAINED_WHOLE,
    FINDS_TRAINED_WHOLE_FROM,
    SEES_PARTS,
    TRAINED_WHOLE,
    is_split_unseen,
    needs,
)

Model = TypeVar("Model", bound=nn.Module)

# What peft makes an adapter's base of, by the task that its config names.
_CLASSES: dict[str, Any] = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}


def plan(
    recipe: Recipe | str | Path, model: Any = None, revision: str | None = None, *, trust_remote_code: bool = False
) -> Plan:
    """Decide what ``recipe`` does to ``model``, module by module; no weight is read.

    ``recipe``: a Recipe, a file, or the name of a shipped one. ``model``: a live model, a config, a folder, a
    config.json or a hub id, of which nothing but config.json is downloaded. ``revision``: a branch, a tag or a commit
    of a hub id. ``trust_remote_code``: run the code that the model brings with it.

    Raises: RecipeError, PlanError, CheckpointError with all that is wrong; ConnectionError if the hub is out of reach.
    """
    check_recipe("plan", recipe, Recipe, (model,))
    check_model("plan", model, transformers.PreTrainedConfig)
    made = as_recipe(recipe)
    if isinstance(model, nn.Module):
        return _following(plan_for(made, model), model)[0]
    is_config = isinstance(model, transformers.PreTrainedConfig)
    config = model if is_config else config_of(model, revision, trust_remote_code=trust_remote_code)
    name = "the model" if is_config else str(model)
    record = record_in(config)
    if record is None:
        refuse_quantized(config, name)
    planned = plan_for(made, skeleton(config, trust_remote_code))
    return planned if record is None else repacked(planned, record, name)


def _following(planned: Plan, model: nn.Module) -> tuple[Plan, Record | None]:
    """Return the plan for a live model and, if it packs one that is wrapped, the record of that: nothing else changes.

    Raises: SurgeryError if the plan would change anything else.
    """
    record = None if planned.recipe.encoding is None else current_record(model)
    if record is None:
        return planned, None
    try:
        return repacked(planned, record, "the model"), record
    except CheckpointError as error:
        raise SurgeryError(str(error)) from error


def as_recipe(recipe: Recipe | str | Path) -> Recipe:
    """Return ``recipe``, loaded if it is a name or a path."""
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def apply(recipe: Recipe | str | Path, model: Model | None = None) -> Model:
    """Wrap the modules of a live model as ``recipe`` says, in place, and return it.

    Its config keeps the record, so that ``save_pretrained`` writes a folder that ``from_pretrained`` rebuilds.
    ``config.name_or_path`` no longer names what the model was loaded from, which is not what it is now: a trainer
    that would reload it as its reference fails instead, until ``reference`` says what it shall load.

    Raises: RecipeError, PlanError, SurgeryError (also for a model that is wrapped already), and CallError for what is
    no live model.
    """
    check_recipe("apply", recipe, Recipe, (model,))
    model = live("apply", model)
    found = hosts(plain_model(model)[1])
    foreign = next(filter(None, (foreign_method(host.config) for host in found)), None)
    if foreign is not None:
        raise SurgeryError(f"the model is quantized already, by {foreign}; expected one in full precision")
    if any(is_split_unseen(host) for host in found):
        raise SurgeryError(
            "transformers split the model over processes, and its layers could not tell that they round a part: "
            f"{needs(SEES_PARTS)}"
        )
    made, before = _following(plan_for(as_recipe(recipe), model), model)
    chosen = {step.module.name: step.quantization for step in made.wrapped if step.quantization is not None}
    excluded = {step.module.name: step.fate for step in made.steps if isinstance(step.fate, Excluded)}
    source = before.source if before is not None else next(filter(None, (_origin(host.config) for host in found)), "")
    for remark in made.remarks:
        warnings.warn(remark, UserWarning, stacklevel=2)
    with uninterrupted():  # from here on there is no way back: what says what was done comes with the operation
        with unwrapped(model) if before is not None else nullcontext():
            operate(model, chosen, untie=made.recipe.untie, storage=made.recipe.storage)
        if made.noise is not None and before is None:
            install(model, made.noise)
        mark(model, Origin(source, made.recipe.text), excluded)
        follow_rollouts(model, chosen.values())
        for host in found:
            if not quant_layers(host):
                continue
            note(host)
            if host.config.name_or_path and before is None:
                host.config.name_or_path += " rewritten in memory by qsurgeon: see qsurgeon.reference"
            host.add_model_tags([QUANT_METHOD])
    for one in found or [model]:
        announce(one)
    return model


def _origin(config: Any) -> str:
    """Return what a record calls the model that was loaded with ``config``; nothing if that is not known."""
    name = getattr(config, "name_or_path", "")
    return origin(name) if name else ""


def reference(model: nn.Module, source: str | Path, *, wrapped: bool) -> None:
    """Say what a trainer loads as the reference of ``model``: ``source``, which is ``wrapped`` or in full precision.

    TRL's trainers load their reference from ``model.config.name_or_path``, unless they are given one or train an
    adapter, which they switch off instead: then the reference is the wrapped base, and putting an adapter on a model
    whose reference shall be in full precision is refused. No weight is read here. ``source``: a folder or a hub id,
    with the weights that the reference shall have; ``qsurgeon.load`` leaves its own folder there, which is wrapped.

    Raises: NothingWrappedError if ``source`` shall be wrapped and is not; CheckpointError if it shall not and is, or
    if there is no model; SurgeryError for a model without a config to say it in, and for one with an adapter whose
    reference shall be in full precision.
    """
    root = plain_model(model)[1]
    config = getattr(root, "config", None)
    if not isinstance(config, transformers.PreTrainedConfig):
        raise SurgeryError(f"{type(model).__name__} has no config that could name its reference")
    there = config_of(source)
    refuse_foreign(there, str(source))
    if wrapped and record_in(there) is None:
        raise NothingWrappedError(_nothing(source))
    if not wrapped and record_in(there) is not None:
        raise CheckpointError(f"{source} was rewritten by qsurgeon; expected a checkpoint in full precision")
    if not wrapped and quant_layers(model) and any(module.adapter for module in inventory(model)):
        refuse_unloaded(str(source))
    config.name_or_path = str(source)
    remember(root, str(source), wrapped=wrapped)


def load(path: str | Path, auto_class: Any = None, **kwargs: Any) -> Any:
    """Return the model in a folder (or under a hub id) that qsurgeon wrote; wrapped and whole, or not at all.

    A folder that another tool quantized (see ``import_checkpoint``) is imported into the cache first,
    with the codes that it has.

    ``auto_class``: the class that config.json names, unless told otherwise. ``kwargs`` go to its ``from_pretrained``.

    Raises: NothingWrappedError if the model has no QuantLinear: it would silently be full precision. CheckpointError
    if the checkpoint lacks a tensor of the model, such as the head of another class. SurgeryError for an adapter that
    computes past wrapped layers, or takes codes for values.
    """
    check_path("load", path, "path")
    path = named(path)
    register()
    inside = Path(path) / (kwargs.get("subfolder") or "")
    if inside == Path(path) and inside.is_dir() and foreign_method_in(inside) is not None:
        path = inside = imported(inside, trust_remote_code=bool(kwargs.get("trust_remote_code")))
    if inside.is_dir():
        _check(inside, kwargs)
    options, finding = {**kwargs, "output_loading_info": True}, finding_in(kwargs)
    adapter = adapter_at(path, finding)
    if auto_class is None:
        auto_class, config = _class_of(path, kwargs, adapter)
        if config is not None:
            options.setdefault("config", config)
    if adapter is None and not Path(path).exists() and finding.keys() <= {"revision"}:  # as fetch looks for it
        _check(fetch(path, kwargs.get("revision")).folder, kwargs)  # what from_pretrained finds in the cache then
    try:
        model, info = auto_class.from_pretrained(path, **options)
    except SurgeryError as error:
        raise SurgeryError(f"{path}: {error}") from error
    except QSurgeonError:
        raise
    except BAD_ADAPTER as error:
        if (inside / "config.json").is_file() or not (inside / ADAPTER).is_file():
            raise
        raise CheckpointError(f"{path}: the adapter cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if not quant_layers(model):
        raise NothingWrappedError(_nothing_in(path, model, adapter))
    _refuse_random(path, model, auto_class, sorted(info["missing_keys"]))
    return (model, info) if kwargs.get("output_loading_info") else model


def _refuse_random(path: str | Path, model: Any, auto_class: Any, missing: list[str]) -> None:
    """Do nothing if no tensor of a model is ``missing`` in its checkpoint. Raises: CheckpointError."""
    trained = next((name for name in missing if TRAINED_WHOLE in name), None)
    if trained is not None and not FINDS_TRAINED_WHOLE:
        raise CheckpointError(
            f"{path}: the adapter has a trained {trained.partition(TRAINED_WHOLE)[0]}, which transformers does not "
            f"find in its file: {needs(FINDS_TRAINED_WHOLE_FROM)}"
        )
    if missing:
        raise CheckpointError(
            f"{path}: has no tensor {missing[0]}, which {type(model).__name__} would have at random "
            f"({len(missing)} in all). To train it, use {auto_class.__name__}.from_pretrained"
        )


def _check(folder: Path, arguments: Mapping[str, Any]) -> None:
    """Refuse a broken folder, before any library opens it. Raises: as ``check_checkpoint``."""
    # What else is passed may change the model that is built. from_pretrained misses what that one lacks.
    whole = not arguments.keys() - {*FINDING, "device_map", "dtype", "output_loading_info", "trust_remote_code"}
    check_checkpoint(folder, trust_remote_code=bool(arguments.get("trust_remote_code")), whole=whole)


def _class_of(path: str | Path, arguments: Mapping[str, Any], adapter: Mapping[str, Any] | None) -> tuple[Any, Any]:
    """Return the model class to open a checkpoint with: the one that its config.json names, or its ``adapter``'s task.

    Beside it stands the config, if it is of another kind than the class has by itself.

    Raises: NothingWrappedError, before any weight is read, if the config has no record of ours.
    """
    trusted = bool(arguments.get("trust_remote_code"))
    base = None if adapter is None else adapter["base_model_name_or_path"]
    given = finding_in(arguments)
    config = config_of(base, trust_remote_code=trusted) if base else _config_of(path, given, trusted)
    if record_in(config) is None:
        raise NothingWrappedError(_adapter_alone(path, base) if base else _nothing(path, config))
    task = None if adapter is None else _CLASSES.get(str(adapter.get("task_type")))
    if task is not None:
        return task, None
    model_class = architecture(config, trusted)
    if model_class is None:
        return transformers.AutoModel, None
    own = model_class.config_class
    return model_class, None if own is None or isinstance(config, own) else config


def _config_of(path: str | Path, finding: Mapping[str, Any], trust_remote_code: bool) -> Any:
    """Return the config of a checkpoint that is found as ``from_pretrained`` finds it."""
    if Path(path).is_dir():
        return read_config(Path(path) / finding.get("subfolder", ""), trust_remote_code)
    if finding.keys() <= {"revision"}:
        return config_of(path, finding.get("revision"), trust_remote_code=trust_remote_code)
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **finding)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no model at '{path}': {' '.join(str(error).split())[:300]}") from error


def _nothing_in(path: str | Path, model: Any, adapter: Mapping[str, Any] | None) -> str:
    if adapter is not None:
        return _adapter_alone(path, adapter["base_model_name_or_path"])
    if record_in(model.config) is None:
        return _nothing(path)
    return f"{path}: no module of {type(model).__name__} is wrapped; open it as the class that its config.json names"


def _adapter_alone(path: str | Path, base: str) -> str:
    return (
        f"{path}: an adapter, and no module of its base {base} is wrapped. An adapter does not carry a recipe: "
        f"write the base first (qsurgeon apply RECIPE --model {base} --output FOLDER) and train the adapter on that"
    )


def _nothing(path: str | Path, config: Any = None) -> str:
    method = None if config is None else foreign_method(config)
    if method in READERS:
        return f"{path}: is quantized by {method}; import it: qsurgeon import {path} --output FOLDER"
    return (
        f"{path}: no module is wrapped; its config.json has no quantization_config of qsurgeon. "
        f"Write one with: qsurgeon apply RECIPE --model {path} --output FOLDER"
    )
