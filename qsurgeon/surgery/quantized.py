"""What a config says about a model that another tool has quantized."""

from typing import Any

from transformers import PreTrainedConfig

from qsurgeon.errors import CheckpointError
from qsurgeon.surgery.record import QUANT_METHOD

# Published models that exist in no other form, and what transformers (5.23) dequantizes them with. What it saves of
# them by itself does not load as what it was: it does the quantizer's conversions backwards.
_DEQUANTIZED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
# Where a config says it; the second is what compressed-tensors wrote at first.
_SECTIONS = ("quantization_config", "compression_config")


def refuse_quantized(config: Any, name: str) -> None:
    """Do nothing for the config of a model in full precision: a dict, or one of transformers'.

    Raises: CheckpointError, calling the model ``name``, if something quantized it, or if we rewrote it.
    """
    refuse_foreign(config, name)
    if QUANT_METHOD in _methods(config):
        raise CheckpointError(f"{name} was rewritten by qsurgeon already; apply the recipe to the model it came from")


def refuse_foreign(config: Any, name: str) -> None:
    """Do nothing for a config in full precision or of ours. Raises: CheckpointError if something else quantized it."""
    method = foreign_method(config)
    if method is not None:
        hint = ""
        if method in _DEQUANTIZED:
            hint = (
                ". transformers has it so: model = from_pretrained(…, "
                f"quantization_config={_DEQUANTIZED[method]}(dequantize=True)); wrap and save that: "
                "qsurgeon.apply(recipe, model), then model.save_pretrained(…)"
            )
        raise CheckpointError(
            f"{name} is quantized already, by {method}; expected a checkpoint in full precision{hint}"
        )


def foreign_method(config: Any) -> str | None:
    """Return the quantization method in a config that is not ours, if there is one.

    ``config``: a dict, one of transformers', or None. A model of several parts may say it in its text_config.
    """
    return next((method for method in _methods(config) if method != QUANT_METHOD), None)


def is_ours(section: Any) -> bool:
    """Return whether a ``quantization_config``, a dict or one of transformers', is of qsurgeon."""
    return section is not None and _method(section) == QUANT_METHOD


def configs_in(config: Any) -> list[Any]:
    """Return a config of transformers, and all configs of parts of the model that are in it, each once."""
    found: dict[int, Any] = {}
    waiting = [config]
    while waiting:
        one = waiting.pop()
        if id(one) not in found:
            found[id(one)] = one
            waiting += [part for part in vars(one).values() if isinstance(part, PreTrainedConfig)]
    return list(found.values())


def _methods(config: Any) -> list[str]:
    parts = (config, _get(config, "text_config"))
    found = [_get(part, section) for part in parts for section in _SECTIONS]
    return [_method(one) for one in found if one is not None]


def _method(found: Any) -> str:
    method = _get(found, "quant_method")
    if method is None:
        return "a method that its config does not name"
    return str(getattr(method, "value", method))  # transformers' own are members of an enum


def _get(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, dict) else getattr(config, key, None)
