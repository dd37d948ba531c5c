"""Wrong arguments to the public functions: each error shows the correct call.

Objects of other libraries are told by the names of their classes, so that nothing is imported for it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsurgeon.errors import CallError

CALLS = {
    "apply": "qsurgeon.apply(recipe, model)",
    "plan": "qsurgeon.plan(recipe, model)",
    "rewrite": "qsurgeon.rewrite(recipe, source, destination)",
    "inspect": "qsurgeon.inspect(model)",
    "load": "qsurgeon.load(path)",
    "load_recipe": "qsurgeon.load_recipe(name)",
    "merge": "qsurgeon.merge(adapter, output)",
    "scan": "qsurgeon.scan(recipe, model)",
}
_EXAMPLE = '"w4a4-mxfp4"'

# Classes of other libraries, the narrower first: what they are, and what of theirs is the model.
_KINDS = (
    (("PreTrainedTokenizerBase", "SpecialTokensMixin"), "a tokenizer", ""),
    (("ProcessorMixin", "ImageProcessingMixin", "FeatureExtractionMixin", "BaseImageProcessor"), "a processor", ""),
    (("Trainer", "_BaseTrainer", "LightningTrainer"), "a trainer", "trainer.model"),
    (("Pipeline",), "a pipeline", "pipe.model"),
    (("DiffusionPipeline",), "a pipeline", "pipe.transformer (or pipe.unet)"),
    (("PreTrainedConfig", "PretrainedConfig"), "a config", ""),
    (("PeftConfig", "PeftConfigMixin"), "a config of peft", ""),
    (("TrainingArguments",), "a trainer's settings", ""),
    (("Optimizer",), "an optimizer", ""),
    (("Accelerator",), "an accelerator", ""),
    (("Module",), "a model", ""),
)


def is_path(value: Any) -> bool:
    """Say whether ``value`` is text or a path."""
    return isinstance(value, str | os.PathLike)


def is_module(value: Any) -> bool:
    """Say whether ``value`` is a module of torch."""
    return any(one.__name__ == "Module" and one.__module__.startswith("torch.") for one in type(value).__mro__)


def described(value: Any) -> tuple[str, str]:
    """Return what ``value`` is, in words, and how the model in it is called, if there is one."""
    if value is None:
        return "None", ""
    if isinstance(value, type):
        return f"the class {value.__name__}", ""
    if is_path(value):
        return repr(str(value)), ""
    if isinstance(value, Mapping) and not hasattr(value, "to_dict"):
        tensors = bool(value) and all(type(one).__name__ in {"Tensor", "Parameter"} for one in value.values())
        return ("a state dict" if tensors else "a dict"), ""
    own = type(value)
    if own.__module__.startswith("qsurgeon."):
        return f"a {own.__name__} of qsurgeon", ""
    names = {one.__name__ for one in own.__mro__}
    what, model = next(((what, model) for classes, what, model in _KINDS if names & {*classes}), ("", ""))
    article = "an" if own.__name__[:1] in "aeiouAEIOU" else "a"
    return f"{what} ({own.__name__})" if what else f"{article} {own.__name__}", model


def check_recipe(function: str, recipe: Any, own: type, others: tuple[Any, ...] = ()) -> None:
    """Do nothing for a recipe of the class ``own``, or a name of one.

    ``others``: what stands behind it. Raises: CallError, with the right order if one of these is a recipe.
    """
    if isinstance(recipe, own):
        return
    swapped = next((one for one in others if isinstance(one, own) or (is_path(one) and not is_path(recipe))), None)
    if is_path(recipe):
        if Path(recipe).is_dir() and any(isinstance(one, own) or is_path(one) for one in others):
            raise CallError(f"{CALLS[function]}: {str(recipe)!r} is a folder, and the recipe comes first")
        return
    what, _ = described(recipe)
    if isinstance(recipe, Mapping):
        raise CallError(f"{CALLS[function]}: a dict is no recipe yet; say qsurgeon.Recipe(**recipe)")
    if not is_module(recipe):
        raise CallError(f"{CALLS[function]}: {what} is no recipe; expected the name of one, a file or a Recipe")
    first = _EXAMPLE if swapped is None else f'"{swapped}"' if is_path(swapped) else "recipe"
    raise CallError(
        f"{CALLS[function]}: the recipe comes first, and here {what} does; say "
        f"{CALLS[function].replace('recipe', first)}"
    )


def check_name(name: Any) -> None:
    """Do nothing for the name of a recipe, or the path of one. Raises: CallError for anything else."""
    if is_path(name):
        return
    what = described(name)[0]
    hint = "; a recipe that is made in Python is qsurgeon.Recipe(**dict)" if isinstance(name, Mapping) else ""
    raise CallError(f"{CALLS['load_recipe']}: {what} is no name of a recipe; expected text or a path{hint}")


def live(function: str, model: Any) -> Any:
    """Return a live model as it is. Raises: CallError for anything else, with what to say for it."""
    if is_module(model):
        return model
    call = CALLS[function]
    if model is None:
        raise CallError(f"{call}: there is no model; say {call.replace('recipe', _EXAMPLE)}, with the model itself")
    what, inside = described(model)
    if is_path(model):
        raise CallError(
            f"{call}: {what} is text, and this takes a live model; load it first (from_pretrained({what})), or write "
            f"another folder: qsurgeon.rewrite(recipe, {what}, destination)"
        )
    hint = f"; say {call.replace('model', inside)}" if inside else ""
    raise CallError(f"{call}: {what} is no model{hint}")


def check_model(function: str, model: Any, config: type | None = None) -> None:
    """Do nothing for a live model, the name of one, or a ``config``, if that will do. Raises: CallError otherwise."""
    if is_module(model) or is_path(model) or (config is not None and isinstance(model, config)):
        return
    what, inside = described(model)
    hint = f"; say {CALLS[function].replace('model', inside)}" if inside else ""
    also = "" if config is None else " a config,"
    raise CallError(f"{CALLS[function]}: {what} is no model; expected a live one,{also} a folder or a hub id{hint}")


def check_path(function: str, value: Any, name: str) -> None:
    """Do nothing for text or a path, which ``name`` takes. Raises: CallError for anything else."""
    if is_path(value) and str(value):
        return
    what = described(value)[0] if value not in (None, "") else "missing"
    live = ""
    if is_module(value):
        live = {
            "rewrite": '; a live model is changed by qsurgeon.apply(recipe, model), and saved by save_pretrained("…")',
            "load": "; whether a live model is wrapped, qsurgeon.inspect(model) says",
            "merge": "; save the adapter first: model.save_pretrained(adapter)",
        }.get(function, "")
    raise CallError(f"{CALLS[function]}: {name} is {what}; expected text or a path{live}")
