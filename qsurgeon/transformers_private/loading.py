"""How transformers builds, loads and saves a model."""

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations import peft as adapters
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping
from transformers.utils.peft_utils import find_adapter_config_file

try:
    from transformers.distributed.tensor_parallel import ColwiseParallel, RowwiseParallel
except ImportError:  # until 5.15
    _SPLITTING: tuple[type, ...] = ()
else:
    _SPLITTING = (ColwiseParallel, RowwiseParallel)

__all__ = [
    "CASTS_BEFORE_QUANTIZING",
    "CONVERSIONS",
    "FINDS_TRAINED_WHOLE",
    "FINDS_TRAINED_WHOLE_FROM",
    "GET_QUANTIZER",
    "LOAD_TENSORS",
    "MAKE",
    "REPORT",
    "RETURNS_NO_INFO",
    "REVERT",
    "SEES_PARTS",
    "SPLITTING",
    "TRAINED_WHOLE",
    "UPLOAD",
    "USE_PARTS",
    "ConversionOps",
    "Loaded",
    "Transforms",
    "WeightConverter",
    "WeightRenaming",
    "WeightTransform",
    "adapters",
    "asked_dtype",
    "auto_mappings",
    "casting_to",
    "converted_name",
    "copy_of_converter",
    "dot_natural_key",
    "fill_renaming",
    "find_adapter_config_file",
    "get_class_from_dynamic_module",
    "get_model_conversion_mapping",
    "ignored_if_missing",
    "is_split_unseen",
    "joined_name",
    "loaded_name",
    "loads",
    "needs",
    "renamed_name",
    "reversed_transforms",
    "saves_here",
    "sorted_transforms",
    "ties",
    "without_weights",
]

Transforms = Sequence[WeightTransform]
Sorted = tuple[list[WeightRenaming], list[WeightConverter]]


# --- what qsurgeon replaces: two methods of PreTrainedModel, and functions where transformers.modeling_utils has them

UPLOAD = "_upload_modified_files"
MAKE = "_from_config"
GET_QUANTIZER = "get_hf_quantizer"
REVERT = "revert_weight_conversion"
CONVERSIONS = "get_model_conversion_mapping"
LOAD_TENSORS = "convert_and_load_state_dict_in_model"

# Until 5.22 a weight that is to be quantized is first cast to the dtype of the parameter that it will be codes in.
CASTS_BEFORE_QUANTIZING = Version(transformers.__version__) < Version("5.23")

# Until 5.6 ``load_adapter`` returns nothing of what it loaded, and only reports it.
RETURNS_NO_INFO = Version(transformers.__version__) < Version("5.7")
REPORT = "log_state_dict_report"  # where transformers.integrations.peft has it

# From 5.17 on ``load_adapter`` finds modules that were trained as a whole, such as the head of a classifier, in an
# adapter's file; before, it leaves them random. Their parameters' names have this of peft's in the middle.
FINDS_TRAINED_WHOLE_FROM = "5.17"
FINDS_TRAINED_WHOLE = Version(transformers.__version__) >= Version(FINDS_TRAINED_WHOLE_FROM)
TRAINED_WHOLE = ".modules_to_save."

# From 5.16 on a layer's weight that is split over processes is a DTensor, which says so; before, a plain tensor.
SEES_PARTS = "5.16"
SPLITTING = _SPLITTING
USE_PARTS = "should_use_local_tensors"


# --- what a checkpoint's tensors are called

# From 5.15 on, names are converted before they are renamed when a model is saved; before, always after.
_CONVERTS_FIRST = "reverse" in signature(rename_source_key).parameters
_PREFIX_CHANGE: Any = getattr(core_model_loading, "PrefixChange", ())  # from 5.7 on
# From 5.9 on a transform may belong to a part of the model alone; ``force_cpu`` came by 5.16.
_OF_CONVERTERS = ("force_cpu", "scope_prefix", "base_model_prefix")


def sorted_transforms(transforms: Transforms) -> Sorted:
    """Return the renamings and the converters of ``transforms``, each in their order."""
    return (
        [one for one in transforms if isinstance(one, WeightRenaming)],
        [one for one in transforms if isinstance(one, WeightConverter)],
    )


def reversed_transforms(transforms: Transforms) -> list[WeightTransform]:
    """Return what undoes ``transforms``, in the order in which it is done when a model is saved.

    A prefix is added or dropped as the checkpoint had it; loading goes by either.
    """
    undone = [one.reverse_transform() for one in transforms if not isinstance(one, _PREFIX_CHANGE)]
    return undone[::-1] if _PREFIX_CHANGE else undone  # both came with 5.7


def renamed_name(name: str, renamings: Sequence[WeightRenaming]) -> str:
    """Return ``name`` after all ``renamings``."""
    return str(rename_source_key(name, list(renamings), [])[0])


def converted_name(name: str, converters: Sequence[WeightConverter]) -> tuple[str, str | None]:
    """Return what the first of ``converters`` that takes ``name`` makes of it, and the pattern that named it."""
    new, pattern = rename_source_key(name, [], list(converters))
    return new, pattern


def joined_name(name: str, transforms: Sorted) -> tuple[str, str | None]:
    """Return under which name a tensor is joined with others when a model is saved, and by which pattern."""
    renamings, converters = transforms
    return converted_name(name if _CONVERTS_FIRST else renamed_name(name, renamings), converters)


def loaded_name(name: str, transforms: Sorted, prefix: str, state: dict[str, Any]) -> tuple[str, str | None]:
    """Return into which of the tensors of ``state`` a stored one is loaded, and by which pattern of a converter."""
    new, pattern = rename_source_key(name, *transforms, prefix, state)
    if new not in state and name in state:
        new, pattern = rename_source_key(name, [], [], prefix, state)
    return new, pattern


def fill_renaming(empty: WeightRenaming, inner: WeightRenaming) -> None:
    """Let a renaming of a subclass, of which nothing is set, be what ``inner`` is."""
    for name in WeightTransform.__slots__:
        object.__setattr__(empty, name, getattr(inner, name))


def copy_of_converter(converter: WeightConverter, kind: type[WeightConverter]) -> Any:
    """Return a converter of another class that does what ``converter`` does."""
    patterns = list(converter._original_source_patterns), list(converter._original_target_patterns)
    new = kind(*patterns, operations=converter.operations)
    for name in _OF_CONVERTERS:
        if hasattr(converter, name):
            setattr(new, name, getattr(converter, name))
    return new


# --- what is loaded


@dataclass(frozen=True)
class Loaded:
    """One tensor of a checkpoint, and what it is loaded into: the names, or the ends of names, of parameters.

    dtype: what the model's class asks for it, where it asks.
    """

    stored: str
    targets: Sequence[str]
    is_converted: bool
    tensor: Any
    dtype: torch.dtype | None


def loads(model: Any, state_dict: Mapping[str, Any], load_config: Any) -> Iterator[Loaded]:
    """Yield what ``convert_and_load_state_dict_in_model`` is about to load; nothing is read."""
    transforms = sorted_transforms(deepcopy(load_config.weight_mapping or []))  # they remember what they renamed
    patterns = {pattern: one for one in transforms[1] for pattern in one.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    for stored in sorted(state_dict, key=dot_natural_key):
        name, pattern = loaded_name(stored, transforms, prefix, state)
        if name in state:
            targets = [name] if pattern is None else patterns[pattern].target_patterns
            yield Loaded(stored, targets, pattern is not None, state_dict[stored], asked_dtype(load_config, name))


def casting_to(load_config: Any, dtypes: Mapping[str, torch.dtype]) -> Any:
    """Return a ``load_config`` by which what is loaded under each name is cast to its dtype, whatever the class asks.

    Of two patterns that match, transformers takes the one whose match begins first: these begin with the name.
    """
    names: dict[torch.dtype, list[str]] = {}
    for name, dtype in dtypes.items():
        names.setdefault(dtype, []).append(re.escape(name))
    exact = {f"^(?:{'|'.join(found)})$": dtype for dtype, found in names.items()}
    return replace(load_config, dtype_plan={**exact, **(load_config.dtype_plan or {})})


def asked_dtype(load_config: Any, name: str) -> torch.dtype | None:
    """Return the dtype that a model's class asks for the parameter ``name``, where it asks."""
    plan = (load_config.dtype_plan or {}).items()
    return next((dtype for glob, dtype in plan if re.search(glob.replace("*", ".*"), name)), None)


# --- what a model says of itself


def ignored_if_missing(model: Any) -> Sequence[str]:
    """Return patterns of the tensors that a checkpoint need not have: the model makes them itself."""
    return tuple(model._keys_to_ignore_on_load_missing or ())


def ties(model: Any) -> list[set[str]]:
    """Return the pairs of tied parameters' names, also of a model that is not tied yet."""
    return [{one, other} for one, other in model.all_tied_weights_keys.items()]


def is_split_unseen(model: Any) -> bool:
    """Return whether transformers split ``model`` over processes in a way that its layers cannot see: before 5.16."""
    return not SPLITTING and (getattr(model, "_tp_size", None) or 1) > 1


def needs(least: str) -> str:
    """Return the end of an error: which version of transformers can what this one cannot."""
    return f"that needs transformers {least} or later, this is {transformers.__version__}"


def saves_here(model: Any, is_main_process: bool) -> bool:
    """Return whether ``save_pretrained`` writes files in this process."""
    ask = getattr(model, "should_save_on_this_rank", None)  # from 5.15 on
    return is_main_process if ask is None else bool(ask(is_main_process))


def without_weights(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """Return a model of a class that transformers has, made from its config."""
    return getattr(model_class, MAKE)(config, dtype=dtype)


def auto_mappings() -> list[Any]:
    """Return which models go with which config, of each auto class."""
    return [one for one in vars(modeling_auto).values() if isinstance(one, _LazyAutoMapping)]
