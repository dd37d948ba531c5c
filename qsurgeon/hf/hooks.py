"""What PreTrainedModel does in addition once qsurgeon is imported: it opens, saves and resizes wrapped layers.

Importing this module changes the methods; ``qsurgeon/__init__.py`` imports it right after
``transformers.modeling_utils``.
"""

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from inspect import signature
from typing import Any

from transformers import modeling_utils
from transformers.modeling_utils import PreTrainedModel

from qsurgeon.checkpoint.kept import keeping
from qsurgeon.errors import CheckpointError, SurgeryError
from qsurgeon.hf.adapter_info import noting, returning
from qsurgeon.hf.opening import Stored, opened, opening
from qsurgeon.hf.quantizer import QSurgeonQuantizer
from qsurgeon.hf.saving import saving, uploading
from qsurgeon.layers import PackedLayer, QuantLayer, QuantProduct, packed_layers, uncounted
from qsurgeon.layers.kinds import kind_in
from qsurgeon.patching import Method, patch
from qsurgeon.storage.packed import WEIGHT
from qsurgeon.surgery import inherit, is_ours
from qsurgeon.transformers_private.loading import (
    CASTS_BEFORE_QUANTIZING,
    CONVERSIONS,
    GET_QUANTIZER,
    LOAD_TENSORS,
    MAKE,
    REPORT,
    RETURNS_NO_INFO,
    REVERT,
    SEES_PARTS,
    SPLITTING,
    UPLOAD,
    USE_PARTS,
    adapters,
    asked_dtype,
    casting_to,
    loads,
    needs,
)
from qsurgeon.transformers_private.quantizers import ASKS_OF_EACH_TENSOR

_ASKING_TO_SPLIT = ("tp_plan", "tp_size", "distributed_config")  # arguments of from_pretrained


def _opening(load: Method) -> Method:
    """Let ``from_pretrained`` open what the checkpoint says, and refuse one that lacks a tensor of its own model."""
    parameters = signature(load)

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        bound = parameters.bind(cls, *args, **kwargs)
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        with opening(given.get("pretrained_model_name_or_path"), given) as stored:
            if stored is None or not stored.is_ours:
                return load(cls, *args, **kwargs)
            _refuse_unseen_parts(stored.source, given)
            model, info = load(cls, *args, **{**kwargs, "output_loading_info": True})
        _refuse_missing(model, info, stored)
        return (model, info) if kwargs.get("output_loading_info") else model

    return from_pretrained


def _refuse_unseen_parts(source: str, arguments: Mapping[str, Any]) -> None:
    """Do nothing where a layer whose weight is split over processes can tell. Raises: SurgeryError."""
    asked = next((name for name in _ASKING_TO_SPLIT if arguments.get(name) is not None), None)
    if asked is not None and not SPLITTING:
        raise SurgeryError(
            f"{source}: {asked} would split the weights of a wrapped model over processes, and its layers could not "
            f"tell that they round a part: {needs(SEES_PARTS)}"
        )


def _refuse_missing(model: Any, info: Any, stored: Stored) -> None:
    missing = sorted(info["missing_keys"])
    if missing and type(model).__name__ == stored.saved_class:
        raise CheckpointError(f"{stored.source}: the checkpoint has no tensor {missing[0]}")


def _settling(get: Method) -> Method:
    """Let the checkpoint's own config say how it is quantized: a part's config, or the caller's, may not know."""

    def get_hf_quantizer(config: Any, *args: Any, **kwargs: Any) -> Any:
        stored = opened()
        if stored is not None:
            stored.settle(config)
        return get(config, *args, **kwargs)

    return get_hf_quantizer


def _converting(get: Method) -> Method:
    """Let what renames, joins and splits the tensors of a checkpoint leave codes and scales alone."""

    def get_model_conversion_mapping(model: Any, key_mapping: Any = None, quantizer: Any = None, *args: Any) -> Any:
        conversions = get(model, key_mapping, quantizer, *args)
        is_known = isinstance(quantizer, QSurgeonQuantizer)
        return quantizer.conversions_past_codes(conversions, model) if is_known else conversions

    return get_model_conversion_mapping


def _telling(load: Method) -> Method:
    """Tell our quantizer of each tensor before it is read, and have it cast as transformers itself has it from 5.23 on.

    Before 5.21 a quantizer is asked of no tensor, and one of a quantized checkpoint stays in the file's dtype if the
    parameter has another name. Before 5.23 a weight that is to be packed is cast to the dtype of its codes first, and
    codes to the dtype that a model's class asks for the weight (``_keep_in_fp32_modules``).
    """
    parameters = signature(load)

    def convert_and_load_state_dict_in_model(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(*args, **kwargs)
        model, stored, config = (given.arguments[name] for name in ("model", "state_dict", "load_config"))
        quantizer, is_renamed = config.hf_quantizer, False
        if not isinstance(quantizer, QSurgeonQuantizer) or (quantizer.pre_quantized and ASKS_OF_EACH_TENSOR):
            return load(*args, **kwargs)
        if quantizer.pre_quantized:
            exact = quantizer.codes()
            for one in loads(model, stored, config):
                quantizer.expect(one.targets, one.is_converted, one.tensor, one.dtype)
                is_renamed |= one.is_converted or one.stored != one.targets[0]
        else:
            weights = (f"{name}.{WEIGHT}" for name in packed_layers(model))
            exact = {name: asked_dtype(config, name) or config.dtype for name in weights}
        given.arguments["load_config"] = casting_to(config, exact)
        with quantizer.casting() if is_renamed else nullcontext():
            return load(*given.args, **given.kwargs)

    return convert_and_load_state_dict_in_model


def _making(make: Method) -> Method:
    """Warn of a model that is made from the config of a wrapped checkpoint alone: nothing of it is wrapped."""

    def from_config(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        if opened() is None and is_ours(getattr(config, "quantization_config", None)):
            warnings.warn(
                f"a {cls.__name__} that is made from a config is in full precision, also where the config is that of a "
                "model which qsurgeon wrapped; qsurgeon.load opens its checkpoint, qsurgeon.apply wraps a model",
                UserWarning,
                stacklevel=3,
            )
        return make(cls, config, *args, **kwargs)

    return from_config


def _resizing(resize: Method) -> Method:
    """Let an output head that is resized stay wrapped: transformers makes a new layer of it."""
    parameters = signature(resize)

    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.get_output_embeddings()
        arguments = parameters.bind(self, *args, **kwargs).arguments
        size = arguments.get("new_num_tokens")
        stays = size is None or (
            isinstance(before, QuantProduct) and size == before.features[0] and not arguments.get("pad_to_multiple_of")
        )
        if isinstance(before, PackedLayer) and not stays:
            raise SurgeryError(
                f"the output head of {type(self).__name__} is packed, and codes cannot be resized: resize the token "
                "embeddings first, then apply the recipe"
            )
        done = resize(self, *args, **kwargs)
        after = self.get_output_embeddings()
        if isinstance(before, QuantLayer) and after is not before and not isinstance(after, QuantLayer):
            kind_in(before).wrap(after, before.quantizations)
            inherit(after, before)
        return done

    return resize_token_embeddings


def _counting_values(count: Method) -> Method:
    """Let ``num_parameters`` count the values of packed weights, and not their bytes."""
    parameters = signature(count)

    def num_parameters(self: Any, *args: Any, **kwargs: Any) -> int:
        only_trainable = parameters.bind(self, *args, **kwargs).arguments.get("only_trainable", False)
        found: int = count(self, *args, **kwargs)
        return found if only_trainable else found + uncounted(self)

    return num_parameters


def _staying_sharded(ask: Method) -> Method:
    """Let a wrapped layer see that its weight is split: transformers hands a layer its part as a plain tensor.

    It does so where no gradient is computed, and a part alone does not say what the whole is rounded with.
    """

    def should_use_local_tensors(self: Any, module: Any) -> bool:
        return not isinstance(module, QuantLayer) and bool(ask(self, module))

    return should_use_local_tensors


for _style in SPLITTING:
    patch(_style, USE_PARTS, _staying_sharded)
patch(PreTrainedModel, "from_pretrained", _opening)
patch(PreTrainedModel, "save_pretrained", saving)
patch(PreTrainedModel, UPLOAD, uploading)
patch(PreTrainedModel, MAKE, _making)
patch(PreTrainedModel, "resize_token_embeddings", _resizing)
patch(modeling_utils, REVERT, keeping)  # where save_pretrained looks it up
patch(modeling_utils, GET_QUANTIZER, _settling)  # where from_pretrained looks these up
patch(modeling_utils, CONVERSIONS, _converting)
if RETURNS_NO_INFO:
    patch(adapters, REPORT, noting)
    patch(PreTrainedModel, "load_adapter", returning)
if CASTS_BEFORE_QUANTIZING:
    patch(modeling_utils, LOAD_TENSORS, _telling)
patch(PreTrainedModel, "num_parameters", _counting_values)
