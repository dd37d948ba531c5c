"""A recipe and a Hugging Face model: plan, apply, load, and what the model's config says of it."""

from pathlib import Path
from typing import Any

import transformers
from torch import nn

from qsurgeon.checkpoint import carry_cards, config_of, origin
from qsurgeon.errors import CheckpointError, NothingWrappedError, SurgeryError
from qsurgeon.launch.announce import announce
from qsurgeon.layers import quant_linears
from qsurgeon.quantizer import QSurgeonConfig, attach, follow_rollouts, record_in, register
from qsurgeon.recipe import Recipe, load_recipe
from qsurgeon.surgery import (
    QUANT_METHOD,
    Plan,
    architecture,
    build_plan,
    foreign_method,
    inventory,
    operate,
    plain_model,
    read_config,
    record_of,
    refuse_foreign,
    refuse_quantized,
    skeleton,
    uninterrupted,
)
from qsurgeon.version import __version__

ADAPTER = "adapter_config.json"


def plan(
    recipe: Recipe | str | Path, model: Any, revision: str | None = None, *, trust_remote_code: bool = False
) -> Plan:
    """Decide what ``recipe`` does to ``model``, module by module; no weight is read.

    ``recipe``: a Recipe, a file, or the name of a shipped one. ``model``: a live model, a config, a folder, a
    config.json or a hub id, of which nothing but config.json is downloaded. ``revision``: a branch, a tag or a commit
    of a hub id. ``trust_remote_code``: run the code that the model brings with it.

    Raises: RecipeError, PlanError, CheckpointError with all that is wrong; ConnectionError if the hub is out of reach.
    """
    made = as_recipe(recipe)
    if isinstance(model, nn.Module):
        return build_plan(made, inventory(model))
    is_config = isinstance(model, transformers.PreTrainedConfig)
    config = model if is_config else config_of(model, revision, trust_remote_code=trust_remote_code)
    refuse_quantized(config, "the model" if is_config else str(model))
    return build_plan(made, inventory(skeleton(config, trust_remote_code)))


def as_recipe(recipe: Recipe | str | Path) -> Recipe:
    """Return ``recipe``, loaded if it is a name or a path."""
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def apply(recipe: Recipe | str | Path, model: nn.Module) -> nn.Module:
    """Wrap the modules of a live model as ``recipe`` says, in place, and return it.

    Its config keeps the record, so that ``save_pretrained`` writes a folder that ``from_pretrained`` rebuilds.
    ``config.name_or_path`` no longer names what the model was loaded from, which is not what it is now: a trainer
    that would reload it as its reference fails instead, until ``reference`` says what it shall load.

    Raises: RecipeError, PlanError, and SurgeryError (also for a model that is wrapped already).
    """
    root: Any = plain_model(model)[1]
    config = getattr(root, "config", None)
    config = config if isinstance(config, transformers.PreTrainedConfig) else None
    foreign = foreign_method(config)
    if foreign is not None:
        raise SurgeryError(f"the model is quantized already, by {foreign}; expected one in full precision")
    made = build_plan(as_recipe(recipe), inventory(model))
    record = QSurgeonConfig(**record_of(made, __version__, _origin(config)).model_dump())
    chosen = {step.module.name: step.quantization for step in made.wrapped if step.quantization is not None}
    follow_rollouts(chosen.values())
    carry_cards(record_in)
    with uninterrupted():  # from here on there is no way back: the record must come with the operation
        operate(model, chosen, untie=made.recipe.untie, storage=made.recipe.storage)
        if made.recipe.storage == "packed":
            attach(root, record)
        if config is not None:
            config.quantization_config = record
            if config.name_or_path:
                config.name_or_path = f"{config.name_or_path} rewritten in memory by qsurgeon: see qsurgeon.reference"
        if hasattr(root, "add_model_tags"):
            root.add_model_tags([QUANT_METHOD])
    announce(root)
    return model


def _origin(config: Any) -> str:
    """Return what a record calls the model that was loaded with ``config``; nothing if that is not known."""
    name = getattr(config, "name_or_path", "")
    return origin(name) if name else ""


def reference(model: nn.Module, source: str | Path, *, wrapped: bool) -> None:
    """Say what a trainer loads as the reference of ``model``: ``source``, which is ``wrapped`` or in full precision.

    TRL's trainers load their reference from ``model.config.name_or_path``, unless they are given one or train an
    adapter, which they switch off instead. No weight is read here. ``source``: a folder or a hub id, with the weights
    that the reference shall have; ``qsurgeon.load`` leaves its own folder there, which is wrapped.

    Raises: NothingWrappedError if ``source`` shall be wrapped and is not; CheckpointError if it shall not and is, or
    if there is no model; SurgeryError for a model without a config to say it in.
    """
    config = getattr(plain_model(model)[1], "config", None)
    if not isinstance(config, transformers.PreTrainedConfig):
        raise SurgeryError(f"{type(model).__name__} has no config that could name its reference")
    there = config_of(source)
    refuse_foreign(there, str(source))
    if wrapped and record_in(there) is None:
        raise NothingWrappedError(_nothing(source))
    if not wrapped and record_in(there) is not None:
        raise CheckpointError(f"{source} was rewritten by qsurgeon; expected a checkpoint in full precision")
    config.name_or_path = str(source)


def load(path: str | Path, auto_class: Any = None, **kwargs: Any) -> Any:
    """Return the model in a folder (or under a hub id) that qsurgeon wrote; wrapped, or not at all.

    ``auto_class``: the class that a folder's config.json names, or AutoModelForCausalLM for a hub id, unless told
    otherwise. ``kwargs`` go to its ``from_pretrained``.

    Raises: NothingWrappedError if the model has no QuantLinear: it would silently be full precision. SurgeryError for
    an adapter that computes past them, or takes codes for values.
    """
    register()
    if auto_class is None:
        auto_class = _class_of(Path(path), bool(kwargs.get("trust_remote_code"))) or transformers.AutoModelForCausalLM
    try:
        model = auto_class.from_pretrained(path, **kwargs)
    except SurgeryError as error:
        raise SurgeryError(f"{path}: {error}") from error
    if quant_linears(model):
        return model
    if (Path(path) / ADAPTER).is_file():
        base = model.config.name_or_path
        raise NothingWrappedError(
            f"{path}: an adapter, and no module of its base {base} is wrapped. An adapter does not carry a recipe: "
            f"write the base first (qsurgeon apply RECIPE --model {base} --output FOLDER) and train the adapter on that"
        )
    raise NothingWrappedError(_nothing(path))


def _class_of(folder: Path, trust_remote_code: bool) -> Any:
    """Return the model class that a folder's config.json names; None for an adapter's folder, and for a hub id.

    Raises: NothingWrappedError, before any weight is read, if the config has no record of ours.
    """
    if not folder.is_dir() or (folder / ADAPTER).is_file():
        return None
    config = read_config(folder, trust_remote_code)
    if record_in(config) is None:
        raise NothingWrappedError(_nothing(folder))
    return architecture(config, trust_remote_code)


def _nothing(path: str | Path) -> str:
    return (
        f"{path}: no module is wrapped; its config.json has no quantization_config of qsurgeon. "
        f"Write one with: qsurgeon apply RECIPE --model {path} --output FOLDER"
    )
