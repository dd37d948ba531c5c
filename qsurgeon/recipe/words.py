"""What other tools call the keys and formats of a recipe. Used in messages only; nothing is accepted by these names."""

import re
from collections.abc import Iterable

from qsurgeon.errors import guess, nearest
from qsurgeon.words import FIELDS

Scheme = tuple[str | None, str | None]  # formats of weight and input

# Names for both operands at once, without case and dashes.
SCHEMES: dict[str, Scheme] = {
    "mxfp4a16": ("mxfp4", None),
    "nvfp4a16": ("nvfp4", None),
    "mxfp8a16": ("mxfp8", None),
    "w4a16": ("int4_b128", None),
    "w4a16asym": ("int4_b128", None),
    "w8a16": ("int8", None),
    "w8a8": ("int8", "int8"),
    "int8dynamic": ("int8", "int8"),
    "w4a8": ("int4_b128", "int8"),
    "w4a4": ("mxfp4", "mxfp4"),
    "w4afp8": ("int4_b128", "fp8_e4m3_row"),
    "fp8dynamic": ("fp8_e4m3_row", "fp8_e4m3_row"),
    "fp8block": ("fp8_e4m3_128x128", "fp8_e4m3_row"),
    "w8a8fp8": ("fp8_e4m3_row", "fp8_e4m3_row"),
}
_NONE = {"none", "null", "no", "off", "false", "bf16", "bfloat16", "fp16", "float16", "half", "fp32", "float32", "full"}
_METHODS = {"gptq", "awq", "autoround", "smoothquant", "hqq", "rtn", "quarot", "spinquant", "bnb", "bitsandbytes"}
_NEAR = {
    **dict.fromkeys(("nf4", "4bit", "4", "q4_k_m", "q4_0", "float4", "fp4_e2m1", "e2m1"), ("mxfp4", "nvfp4")),
    **dict.fromkeys(("8bit", "8", "q8_0"), ("int8", "mxfp8", "fp8_e4m3_row")),
    **dict.fromkeys(("float8", "float8_e4m3fn", "fp8_e4m3fn", "e4m3"), ("fp8_e4m3_row", "fp8_e4m3", "mxfp8_e4m3")),
    **dict.fromkeys(("uint4", "i4"), ("int4_b32", "int4_b64", "int4_b128")),
    **dict.fromkeys(("uint8", "i8"), ("int8", "mxint8")),
}
MOST_OFFERED = 6

# What other tools call our keys.
KEYS = {
    "target": ("targets", "include", "includes", "modules", "module", "layers", "target_modules", "pattern", "patterns",
               "names", "match", "linears", "params"),
    "exclude": ("ignore", "ignored", "ignore_layers", "skip", "excludes", "excluded", "exclude_modules", "skip_modules",
                "modules_to_not_convert", "llm_int8_skip_modules", "exclude_layers", "blacklist", "disable", "not"),
    "weight": ("weights", "weight_format", "weight_dtype", "w", "wfmt", "weight_quant", "qweight", "weight_quantizer"),
    "input": ("activations", "activation", "act", "acts", "inputs", "input_activations", "a", "activation_format",
              "input_format", "act_dtype", "activation_dtype", "input_quantizer", "x"),
    "types": ("module_types", "kinds", "classes", "layer_types"),
    "model": ("model_name", "model_id", "model_path", "model_name_or_path", "base_model", "checkpoint", "source"),
    "output": ("output_dir", "out", "out_dir", "save_dir", "save_path", "output_path", "destination", "dest"),
    "extends": ("base", "inherit", "inherits", "parent", "defaults", "from", "include"),
    "rules": ("layers_config", "config_groups", "groups", "modifiers", "overrides", "recipe"),
    "formats": ("dtypes", "custom_formats", "schemes"),
    "version": ("schema_version", "recipe_version", "v"),
    "untie": ("untie_embeddings", "untie_weights", "untie_word_embeddings"),
    **{field.name: field.shown.others for field in FIELDS},
    "stages": ("num_stages", "n_stages"),
    "sigma_start": ("sigma", "start", "std", "sigma_max"),
    "sigma_end": ("end", "sigma_min"),
    "per_epoch": ("epoch_aware",),
    "multipliers": ("layer_multipliers", "layer_sigma_config", "factors"),
    "multiplier": ("factor", "weight"),
    "like": ("base", "from", "extends", "format", "parent", "based_on"),
    "block": ("block_size", "blocksize", "group_size", "groupsize", "group", "block_sizes", "g"),
    "element": ("dtype", "num_bits", "bits", "elem", "elem_format", "element_dtype", "type"),
    "scale": ("scale_dtype", "scale_bits", "scale_format", "scales"),
    "scale_rule": ("scale_rounding", "scaling", "scale_mode", "scale_method", "rule"),
    "rounding": ("round", "rounding_mode", "round_mode"),
    "hadamard": ("rotation", "rotate", "hadamard_size"),
    "tensor_scale": ("global_scale", "per_tensor_scale", "second_scale"),
}  # fmt: skip
# Of a rule, what only a format of the recipe's own can say.
_OF_FORMATS = {"block", "element", "scale", "scale_rule", "rounding", "hadamard", "tensor_scale"}
_BOTH = {"scheme", "format", "dtype", "quant_type", "quantization", "quant", "precision", "qformat", "fmt", "num_bits"}


def unknown_key(word: str, known: Iterable[str]) -> tuple[str, set[str]]:
    """Return the message on a key that is none, and the keys of ``known`` that it probably stands for."""
    here = set(known)
    bare = word.strip().casefold().replace("-", "_")
    start = f"unknown key '{word}'; "
    meant = [key for key, others in KEYS.items() if bare in others]
    found = next((key for key in meant if key in here), None)
    if found is not None:
        return f"{start}here it is called '{found}'", {found}
    if bare in _BOTH and {"weight", "input"} & here:
        return f"{start}say 'weight' and 'input' apart, each with the name of a format", {"weight"}
    field = next((key for key in [bare, *meant] if key in _OF_FORMATS), None)
    if field is not None and "exclude" in here:
        return f"{start}a format of the recipe's own says that: formats: {{mine: {{like: mxfp4, {field}: …}}}}", set()
    near = guess(word, here)
    return f"{start}{nearest(word, here)}", {near} if near else set()


def unknown_format(name: str, known: Iterable[str]) -> str:
    """Return the message on a format that there is not, with what is nearest to it."""
    names = sorted(known, key=lambda one: (len(one), one))
    start = f"no format '{name}'; "
    same = guess(name, names)
    bare = name.strip().casefold()
    plain = re.sub(r"[-_ .]", "", bare)
    if same is not None and re.sub(r"[-_ .]", "", same) == plain:
        return f"{start}did you mean '{same}'?"
    if plain in SCHEMES:
        weight, input = SCHEMES[plain]
        also = f", input: {input}" if input else ", and no input"
        return f"{start}that names weight and input at once; say them apart: weight: {weight}{also}"
    if bare in _NONE:
        return f"{start}leave the key out: what has no format stays as it is"
    if plain in _METHODS:
        return f"{start}that is a way to choose values, and no format; `qsurgeon formats` lists them"
    near = list(_NEAR.get(bare, ()))
    if not near and len(plain) > 2:
        near = [one for one in names if plain in re.sub(r"[-_ .]", "", one)]
        near.sort(key=lambda one: not one.startswith(plain))
    if near:
        return f"{start}the nearest: {', '.join(near[:MOST_OFFERED])}"
    return f"{start}{nearest(name, names)}"
