"""What PreTrainedModel does in addition once qsurgeon is imported: it opens, saves and resizes wrapped layers.

Importing this module changes the methods; ``qsurgeon/__init__.py`` imports it right after
``transformers.modeling_utils``.
"""

import warnings
from inspect import signature
from typing import Any

from transformers import modeling_utils
from transformers.distributed import tensor_parallel
from transformers.modeling_utils import PreTrainedModel

from qsurgeon.checkpoint.kept import keeping
from qsurgeon.errors import CheckpointError, SurgeryError
from qsurgeon.hf.opening import Stored, opened, opening
from qsurgeon.hf.saving import saving, uploading
from qsurgeon.layers import PackedLayer, QuantLayer, QuantProduct, uncounted
from qsurgeon.layers.kinds import kind_in
from qsurgeon.patching import Method, patch
from qsurgeon.surgery import inherit, is_ours


def _opening(load: Method) -> Method:
    """Let ``from_pretrained`` open what the checkpoint says, and refuse one that lacks a tensor of its own model."""
    parameters = signature(load)

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        bound = parameters.bind(cls, *args, **kwargs)
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        with opening(given.get("pretrained_model_name_or_path"), given) as stored:
            if stored is None or not stored.is_ours:
                return load(cls, *args, **kwargs)
            model, info = load(cls, *args, **{**kwargs, "output_loading_info": True})
        _refuse_missing(model, info, stored)
        return (model, info) if kwargs.get("output_loading_info") else model

    return from_pretrained


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
    """Let a wrapped layer see that its weight is split: transformers (5.23) hands a layer its part as a plain tensor.

    It does so where no gradient is computed, and a part alone does not say what the whole is rounded with.
    """

    def should_use_local_tensors(self: Any, module: Any) -> bool:
        return not isinstance(module, QuantLayer) and bool(ask(self, module))

    return should_use_local_tensors


for _style in (tensor_parallel.ColwiseParallel, tensor_parallel.RowwiseParallel):
    patch(_style, "should_use_local_tensors", _staying_sharded)
patch(PreTrainedModel, "from_pretrained", _opening)
patch(PreTrainedModel, "save_pretrained", saving)
patch(PreTrainedModel, "_upload_modified_files", uploading)
patch(PreTrainedModel, "_from_config", _making)
patch(PreTrainedModel, "resize_token_embeddings", _resizing)
patch(modeling_utils, "revert_weight_conversion", keeping)  # where save_pretrained looks it up
patch(modeling_utils, "get_hf_quantizer", _settling)  # where from_pretrained looks it up
patch(PreTrainedModel, "num_parameters", _counting_values)
