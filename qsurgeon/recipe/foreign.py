"""Recipes of other tools that are passed as ours: which tool they belong to, and the equivalent recipe.

They are known by their keys. What is made of one is a text to start from, shown in an error message.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from textwrap import indent
from typing import Any

import yaml

from qsurgeon.recipe.select import is_pattern
from qsurgeon.recipe.translate import ALL_LINEAR, from_regex, is_regex
from qsurgeon.recipe.words import SCHEMES, Scheme

OWN = {"rules", "extends"}
MOST_PATTERNS = 8


MODELS = "transformers"  # whose files are configs of models


@dataclass(frozen=True)
class Tool:
    """A tool, the keys of its files (each set is enough, wherever in the file it stands), and what its files do.

    quantizes: whether they say what a model computes with, so that a recipe can be made of one.
    """

    name: str
    keys: tuple[frozenset[str], ...]
    quantizes: bool = True


def _keys(*names: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(one.split("+")) for one in names)


# In order: the first that fits. A key that ends in `*` stands for all that begin or end so.
TOOLS = (
    Tool("llm-compressor", _keys(
        "*_modifiers", "modifiers", "QuantizationModifier", "GPTQModifier", "AWQModifier", "SmoothQuantModifier",
        "*_stage", "stages",
    )),
    Tool("ModelOpt", _keys("quant_cfg", "quantizer_name", "*_quantizer", "recipe_type", "quant_algo")),
    Tool("torchtune", _keys("_component_")),
    Tool("compressed-tensors", _keys("config_groups")),
    Tool("Quark", _keys("global_quant_config", "layer_quant_config")),
    Tool("mergekit", _keys("merge_method", "slices+dtype", "models+base_model"), quantizes=False),
    Tool("LLaMA-Factory", _keys("finetuning_type", "model_name_or_path+stage"), quantizes=False),
    Tool("axolotl", _keys("base_model+datasets", "base_model+adapter", "base_model+micro_batch_size", "base_model"),
         quantizes=False),
    Tool("bitsandbytes", _keys("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype")),
    Tool("accelerate", _keys("compute_environment", "distributed_type"), quantizes=False),
    Tool("peft", _keys("peft_type"), quantizes=False),
    Tool("TRL", _keys("model_name_or_path+dataset_name", "model_name_or_path"), quantizes=False),
    Tool("torchao", _keys("_type", "quant_type", "int4_weight_only", "weight_only", "_data", "base_config")),
    Tool("GPTQ or AWQ", _keys("w_bit+q_group_size", "bits+group_size", "wbits", "q_group_size", "desc_act")),
    Tool(MODELS, _keys("quantization_config", "model_type", "architectures"), quantizes=False),
)  # fmt: skip


def foreign(raw: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the message on a file of another tool, and what it is as a recipe, or nothing.

    None for what may be a recipe of ours.
    """
    if OWN & raw.keys():
        return None
    method = raw.get("quant_method")
    top = [*raw]
    tool = next((one for one in TOOLS if any(_has(top, keys) for keys in one.keys)), None)
    if tool is None and isinstance(method, str):
        tool = Tool(method if method.isprintable() else "another tool", ())
    if tool is None:
        nested = [key for key, _ in _walk(raw)]
        tool = next((one for one in TOOLS if one.quantizes and any(_has(nested, keys) for keys in one.keys)), None)
    if tool is None:
        return None
    return _quantizes(tool, raw) if tool.quantizes else (_trains(tool, raw), "")


def _has(there: list[str], wanted: frozenset[str]) -> bool:
    return all(any(_is(key, one) for key in there) for one in wanted)


def _is(key: str, wanted: str) -> bool:
    return key.endswith(wanted[1:]) if wanted.startswith("*") else key == wanted


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield each key in ``value`` and what stands there, the outer before the inner."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key), inner
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)


def _trains(tool: Tool, raw: Mapping[str, Any]) -> str:
    if tool.name == MODELS:
        return "is the config of a model, and no recipe; it belongs behind --model: RECIPE --model FOLDER"
    names = ("base_model", "model_name_or_path", "base_model_name_or_path", "_name_or_path")
    said = [raw[name] for name in names if isinstance(raw.get(name), str) and raw[name].isprintable()]
    return (
        f"is a file of {tool.name}, and no recipe: it has no rules. Rewrite the model first, and name the folder "
        f"there: qsurgeon apply w4a4-mxfp4 --model {said[0] if said else 'MODEL'} --output FOLDER"
    )


def _quantizes(tool: Tool, raw: Mapping[str, Any]) -> tuple[str, str]:
    weight, input = _formats(raw)
    rule: dict[str, Any] = {"target": _patterns(raw, "targets", "target", "target_modules") or ["**"]}
    left = _patterns(raw, "ignore", "exclude", "modules_to_not_convert", "llm_int8_skip_modules", "exclude_modules")
    left += [name for name in _switched_off(raw) if name not in left]
    rule["exclude"] = left or ["lm_head?"]
    rule |= {role: name for role, name in (("weight", weight), ("input", input)) if name}
    data = {"version": 1, "rules": [rule]}
    text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=200)
    return f"is a file of {tool.name}, and no recipe; here that is, about:", indent(text.rstrip(), "    ")


def _patterns(raw: Mapping[str, Any], *keys: str) -> list[str]:
    """Return as patterns what the file says under one of ``keys``."""
    found: list[str] = []
    for key, value in _walk(raw):
        if key in keys:
            values = value if isinstance(value, list) else [value]
            found += [one for text in values if isinstance(text, str) for one in [_pattern(text)] if one]
    return [*dict.fromkeys(found)][:MOST_PATTERNS]


def _pattern(text: str) -> str | None:
    if text.casefold() in ALL_LINEAR:
        return "**"
    translated = from_regex(text) if is_regex(text) else None
    best = translated[0] if translated else text.strip()
    return best if is_pattern(best) else None


def _switched_off(raw: Mapping[str, Any]) -> list[str]:
    """Return the patterns that ModelOpt's form switches off, those of quantizers themselves left out."""
    named = (pair for key, value in _walk(raw) for pair in _called(key, value))
    names = [name for name, one in named if one.get("enable") is False]
    found = [re.sub(r"^\*\.?|\.?\*?(?:weight|input|output)?_?quantizer\*?$|\.?\*$", "", name) for name in names]
    return [name for name in found if name and name not in {"default", "*"} and is_pattern(name)]


# What names a format in the names and schemes of tools, the narrower first.
_NAMED = {
    "nvfp4": "nvfp4", "mxfp4": "mxfp4", "mxfp8": "mxfp8", "mxfp6": "mxfp6_e2m3", "mxint8": "mxint8", "nf4": "mxfp4",
    "fp4": "mxfp4", "float8": "fp8_e4m3_row", "fp8": "fp8_e4m3_row", "int8": "int8", "int4": "int4_b128",
}  # fmt: skip


def _formats(raw: Mapping[str, Any]) -> Scheme:
    """Return the formats of weight and input that come nearest to what the file says; if it says none, MXFP4."""
    parts = [
        _numbers(raw, "weights", "*weight_quantizer", "weight"),
        _numbers(raw, "input_activations", "*input_quantizer"),
    ]
    if parts[0] is not None:
        return parts[0], parts[1]
    keys = [key for key, _ in _walk(raw)]
    if any("4bit" in key for key in keys):
        return "mxfp4", None
    if "load_in_8bit" in keys:
        return "int8", None
    bits = next((one for key, one in _walk(raw) if key in {"bits", "w_bit", "wbits"}), None)
    if bits is not None:
        return ("int8" if bits == 8 else "int4_b128"), None
    words = [one for pair in _walk(raw) for one in pair if isinstance(one, str)]
    for word in words:
        plain = re.sub(r"[-_ ]", "", word.casefold())
        if plain in SCHEMES:
            return SCHEMES[plain]
        weight = re.search(rf"({'|'.join(_NAMED)})weight", plain)
        if weight:
            input = re.search(rf"({'|'.join(_NAMED)})(?:dynamic|dyn)?act", plain)
            return _NAMED[weight[1]], _NAMED[input[1]] if input else None
        named = next((name for key, name in _NAMED.items() if key in plain), None)
        if named is not None:
            return named, None if "weightonly" in plain or plain.endswith("a16") else named
    return "mxfp4", "mxfp4"


def _numbers(raw: Mapping[str, Any], *keys: str) -> str | None:
    """Return the format that a mapping called one of ``keys`` spells out in bits and blocks, if there is one."""
    for key, value in _walk(raw):
        for name, one in _called(key, value):
            bits = one.get("num_bits")
            if name not in keys or bits is None:
                continue
            text = json.dumps(one, default=str).replace(" ", "")
            if bits in ([2, 1], "e2m1") or (bits == 4 and '"float"' in text):
                return "nvfp4" if re.search(r"\D16\b", text) else "mxfp4"
            if bits in ([4, 3], "e4m3") or (bits == 8 and '"float"' in text):
                return "mxfp8" if re.search(r"\D32\b", text) else "fp8_e4m3_row"
            return "int8" if bits == 8 else "int4_b128"
    return None


def _called(key: str, value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield mappings with their names: by their key, or as items of a list that say it themselves."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, Mapping):
            inner = one.get("cfg")
            yield str(one.get("quantizer_name", key)), inner if isinstance(inner, Mapping) else one
