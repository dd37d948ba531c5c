"""What PreTrainedModel does more once qsurgeon is imported: it opens, saves and resizes what is wrapped as what it is.

Importing this module changes the methods; ``qsurgeon/__init__.py`` imports it right after
``transformers.modeling_utils``.
"""

from inspect import signature
from typing import Any

from transformers import modeling_utils
from transformers.modeling_utils import PreTrainedModel

from qsurgeon.checkpoint.saving import saving, uploading
from qsurgeon.errors import CheckpointError, SurgeryError
from qsurgeon.layers import PackedLinear, QuantLinear
from qsurgeon.opening import Stored, opened, opening
from qsurgeon.patching import Method, patch
from qsurgeon.surgery import inherit


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


def _resizing(resize: Method) -> Method:
    """Let an output head that is resized stay wrapped: transformers makes a new Linear of it."""
    parameters = signature(resize)

    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.get_output_embeddings()
        arguments = parameters.bind(self, *args, **kwargs).arguments
        size = arguments.get("new_num_tokens")
        stays = size is None or (
            size == getattr(before, "out_features", None) and not arguments.get("pad_to_multiple_of")
        )
        if isinstance(before, PackedLinear) and not stays:
            raise SurgeryError(
                f"the output head of {type(self).__name__} is packed, and codes cannot be resized: resize the token "
                "embeddings first, then apply the recipe"
            )
        done = resize(self, *args, **kwargs)
        after = self.get_output_embeddings()
        if isinstance(before, QuantLinear) and after is not before and not isinstance(after, QuantLinear):
            QuantLinear.wrap(after, before.quantization)
            inherit(after, before)
        return done

    return resize_token_embeddings


patch(PreTrainedModel, "from_pretrained", _opening)
patch(PreTrainedModel, "save_pretrained", saving)
patch(PreTrainedModel, "_upload_modified_files", uploading)
patch(PreTrainedModel, "resize_token_embeddings", _resizing)
patch(modeling_utils, "get_hf_quantizer", _settling)  # where from_pretrained looks it up
