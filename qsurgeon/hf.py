"""transformers' own registration: ``quantization_config`` in config.json, and the quantizer that obeys it.

Importing this module registers both; ``qsurgeon/__init__.py`` sees to it that it is imported as soon as
``transformers.quantizers.auto`` is. Anything of transformers that this depends on and that is not public stands
here, and in checkpoint/saving.py.
"""

from collections.abc import Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qsurgeon.checkpoint import carry_cards, fetch_config, origin
from qsurgeon.errors import CheckpointError, NothingWrappedError, SurgeryError
from qsurgeon.launch.announce import announce
from qsurgeon.layers import Quantization, quant_linears, rollout_unless_told
from qsurgeon.recipe import Recipe, load_recipe
from qsurgeon.surgery import (
    QUANT_METHOD,
    Plan,
    Record,
    architecture,
    build_plan,
    bypassed,
    inventory,
    operate,
    plain_model,
    read_config,
    read_record,
    record_of,
    skeleton,
)
from qsurgeon.version import __version__

ADAPTER = "adapter_config.json"


class QSurgeonConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a model: a Record as transformers wants it."""

    def __init__(self, **fields: Any) -> None:
        self.record = read_record(fields, "config.json")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # the hint says enum, a str is taken

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json keeps."""
        return {"quant_method": QUANT_METHOD, **self.record.model_dump(mode="json")}


class QSurgeonQuantizer(HfQuantizer):
    """Wraps the modules that the config names, before the weights are loaded into them."""

    quantization_config: QSurgeonConfig
    is_trainable = True
    is_qat_trainable = True

    def is_serializable(self) -> bool:
        """Say that the model can be saved."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        quantizations = self.quantization_config.record.quantizations()
        operate(model, _as_named_in(model, quantizations))
        _follow_rollouts(quantizations.values())
        carry_cards(record_in)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, module in quant_linears(model).items():
            for key, parameter in module.named_parameters(recurse=False):
                # transformers marks what it read from the checkpoint; the rest it would leave random. What is still
                # on the meta device was offloaded.
                if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
                    raise CheckpointError(f"the checkpoint has no tensor {name}.{key}")
        # From here on it is an ordinary model: an attached quantizer would make save_pretrained ignore
        # `state_dict=`, which FSDP needs, and block .half() and .float().
        model.hf_quantizer = None
        model.is_quantized = False
        return model


def _as_named_in(model: Any, quantizations: dict[str, Quantization]) -> dict[str, Quantization]:
    """Return ``quantizations`` under the names that ``model`` has for them.

    A checkpoint of a model with a head may be loaded as its base model, and the other way round: then all names
    begin with the base model's prefix on one side only, and what is outside of it does not exist.

    Raises: NothingWrappedError if no module would be left to wrap, CheckpointError if one is missing.
    """
    prefix = model.base_model_prefix + "."
    names = {module.name for module in inventory(model)}
    for rename in (
        _same,
        lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None,
        prefix.__add__,
    ):
        found = {new: how for name, how in quantizations.items() if (new := rename(name)) in names}
        inside = [name for name in quantizations if rename(name) is not None]
        if found and len(found) == len(inside):
            return found
    if found_any := [name for name in quantizations if name in names]:
        missing = next(name for name in quantizations if name not in names)
        raise CheckpointError(f"{type(model).__name__} has {found_any[0]} but no {missing}, which config.json wraps")
    raise NothingWrappedError(
        f"{type(model).__name__} has none of the {len(quantizations)} modules that config.json wraps, "
        f"such as {next(iter(quantizations), 'none')}"
    )


def _same(name: str) -> str | None:
    return name


def _follow_rollouts(quantizations: Iterable[Quantization]) -> None:
    """Let ``generate`` be in the phase ``rollout``, as soon as a model has a layer that asks for the phase.

    Trainers call ``generate`` on what they unwrapped themselves, so that only the class knows of all calls.
    """
    generate = transformers.GenerationMixin.generate
    if all(how.phases == "both" for how in quantizations) or hasattr(generate, "enters_rollout"):
        return

    @wraps(generate)
    def in_rollout(self: Any, *args: Any, **kwargs: Any) -> Any:
        with rollout_unless_told():
            return generate(self, *args, **kwargs)

    vars(in_rollout)["enters_rollout"] = True
    transformers.GenerationMixin.generate = in_rollout  # type: ignore[method-assign]


def register() -> None:
    """Make transformers know ``quant_method: qsurgeon``; a second call does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(QSurgeonConfig)
        register_quantizer(QUANT_METHOD)(QSurgeonQuantizer)


register()


def plan(recipe: Recipe | str | Path, model: Any, revision: str | None = None) -> Plan:
    """Decide what ``recipe`` does to ``model``, module by module; no weight is read.

    ``recipe``: a Recipe, a file, or the name of a shipped one. ``model``: a live model, a config, a folder, a
    config.json or a hub id, of which nothing but config.json is downloaded. ``revision``: a branch, a tag or a commit
    of a hub id.

    Raises: RecipeError, PlanError, CheckpointError with all that is wrong; ConnectionError if the hub is out of reach.
    """
    made = as_recipe(recipe)
    if isinstance(model, nn.Module):
        return build_plan(made, inventory(model))
    is_config = isinstance(model, transformers.PreTrainedConfig)
    config = model if is_config else read_config(fetch_config(model, revision).folder)
    name = "the model" if is_config else str(model)
    refuse_foreign(config, name)
    if record_in(config) is not None:
        raise CheckpointError(f"{name} was rewritten by qsurgeon already; plan on the model it came from")
    return build_plan(made, inventory(skeleton(config)))


def as_recipe(recipe: Recipe | str | Path) -> Recipe:
    """Return ``recipe``, loaded if it is a name or a path."""
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def _foreign_method(config: Any) -> str | None:
    """Return the quantization method in a config that is not ours, if there is one."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method", "?") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return None if method in (None, QUANT_METHOD) else str(getattr(method, "value", method))


def refuse_foreign(config: Any, name: str) -> None:
    """Do nothing for a config in full precision or of ours. Raises: CheckpointError if something else quantized it."""
    method = _foreign_method(config)
    if method is not None:
        raise CheckpointError(f"{name} is quantized already, by {method}; expected a checkpoint in full precision")


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
    foreign = _foreign_method(config)
    if foreign is not None:
        raise SurgeryError(f"the model is quantized already, by {foreign}; expected one in full precision")
    made = build_plan(as_recipe(recipe), inventory(model))
    record = QSurgeonConfig(**record_of(made, __version__, _origin(config)).model_dump())
    chosen = {step.module.name: step.quantization for step in made.wrapped if step.quantization is not None}
    operate(model, chosen, untie=made.recipe.untie)
    _follow_rollouts(chosen.values())
    carry_cards(record_in)
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
    there = read_config(fetch_config(source).folder)
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
    an adapter that computes past them.
    """
    register()
    if auto_class is None:
        auto_class = _class_of(Path(path)) or transformers.AutoModelForCausalLM
    model = auto_class.from_pretrained(path, **kwargs)
    if quant_linears(model):
        past = bypassed(model)
        if past:
            name, how = next(iter(past.items()))
            raise SurgeryError(f"{path}: {len(past)} wrapped modules would have no effect, such as {name}: {how}")
        return model
    if (Path(path) / ADAPTER).is_file():
        base = model.config.name_or_path
        raise NothingWrappedError(
            f"{path}: an adapter, and no module of its base {base} is wrapped. An adapter does not carry a recipe: "
            f"write the base first (qsurgeon apply RECIPE --model {base} --output FOLDER) and train the adapter on that"
        )
    raise NothingWrappedError(_nothing(path))


def _class_of(folder: Path) -> Any:
    """Return the model class that a folder's config.json names; None for an adapter's folder, and for a hub id.

    Raises: NothingWrappedError, before any weight is read, if the config has no record of ours.
    """
    if not folder.is_dir() or (folder / ADAPTER).is_file():
        return None
    config = read_config(folder)
    if record_in(config) is None:
        raise NothingWrappedError(_nothing(folder))
    return architecture(config)


def _nothing(path: str | Path) -> str:
    return (
        f"{path}: no module is wrapped; its config.json has no quantization_config of qsurgeon. "
        f"Write one with: qsurgeon apply RECIPE --model {path} --output FOLDER"
    )


def record_in(config: Any) -> Record | None:
    """Return the record that a config carries, or None if it has none of ours.

    Raises: CheckpointError for a record that cannot be read.
    """
    data = getattr(config, "quantization_config", None)
    if isinstance(data, QSurgeonConfig):
        return data.record
    if isinstance(data, dict) and data.get("quant_method") == QUANT_METHOD:
        return read_record(data, "config.json")
    return None
