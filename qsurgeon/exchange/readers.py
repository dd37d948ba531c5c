"""The readers of compressed-tensors, ModelOpt, and DeepSeek's FP8."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from qsurgeon.checkpoint.reading.headers import Tensor
from qsurgeon.errors import ExchangeError
from qsurgeon.exchange import compressed_tensors, modelopt
from qsurgeon.exchange.encodings import Renamed, reciprocal
from qsurgeon.exchange.foreign import Foreign, Reader, checked, is_exact, number_in, with_static
from qsurgeon.formats import Format, get_format
from qsurgeon.formats.packing import group

_IDENTITY = ("num_bits", "type", "strategy", "group_size", "block_structure")  # of what a scheme computes
_HARMLESS_ORDERS = (None, "static", "weight")


class CompressedTensorsReader(Reader):
    """Reads compressed-tensors."""

    method = compressed_tensors.METHOD

    def weights(self, section: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Foreign]:
        """Yield each quantized weight. Raises: ExchangeError as the class says."""
        if section.get("sparsity_config") or (section.get("transform_config") or {}).get("config_groups"):
            raise ExchangeError("the checkpoint is sparse, or its inputs are rotated: neither can be imported")
        for stem in _stems(tensors, ("weight_packed", "weight_scale")):
            yield checked(self._weight(stem, _group_of(stem, section), tensors))

    def _weight(self, stem: str, scheme: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Foreign:
        weight = _weight_grid(stem, scheme.get("weights") or {})
        own = _own(stem, tensors)
        encoding = compressed_tensors.WEIGHTS[weight].encoding
        if encoding.scale is not None and encoding.scale[1] is torch.bfloat16:
            encoding = replace(encoding, scale=(encoding.scale[0], _scale_dtype(own, encoding, stem)))
        columns = _columns(own, encoding, get_format(weight), stem)
        asked, exact = self._input(stem, scheme.get("input_activations"), own)
        above = encoding.above
        if above is not None and above.name in own and own[above.name].dtype == "BF16":
            encoding = replace(encoding, above=replace(above, dtype=torch.bfloat16))
        if above is not None and above.divides and above.name in own:
            divisor = number_in(own[above.name])
            if not is_exact(divisor):
                exact[above.name] = divisor
        return _foreign(stem, get_format(weight), asked, encoding, own, columns, exact)

    def _input(
        self, stem: str, args: Mapping[str, Any] | None, own: Mapping[str, Tensor]
    ) -> tuple[Format | None, dict[str, float]]:
        """Return the format of the input, and its divisor, if that is not exact."""
        if not args:
            return None, {}
        name = next((name for name, known in compressed_tensors.INPUTS.items() if _is_alike(args, known)), None)
        if name is None:
            raise ExchangeError(f"{stem}: its input activations are {dict(args)}, which nothing here computes")
        if name == "nvfp4, a static scale":
            divisor = number_in(_named(own, compressed_tensors.INPUT_DIVISOR, stem))
            exact = {} if is_exact(divisor) else {compressed_tensors.INPUT_DIVISOR: divisor}
            return with_static("nvfp4", reciprocal(divisor)), exact
        if name == "fp8, a static scale":
            return with_static("fp8_e4m3", number_in(_named(own, compressed_tensors.INPUT_SCALE, stem))), {}
        return INPUTS[name], {}


# The formats of inputs that need no number.
INPUTS = {
    "mxfp4": get_format("mxfp4"),
    "mxfp8": get_format("mxfp8"),
    "fp8, a scale per token": get_format("fp8_e4m3_row"),
    "fp8, a scale per 128": get_format("fp8_e4m3_128x128").with_fields("fp8_e4m3_128", block=128),
    "int8, a scale per token": get_format("int8"),
}


class ModelOptReader(Reader):
    """Reads ModelOpt."""

    method = modelopt.METHOD

    def weights(self, section: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Foreign]:
        """Yield each quantized weight. Raises: ExchangeError as the class says."""
        for stem in _stems(tensors, ("weight_scale",)):
            algorithm = _algorithm(stem, section)
            own = _own(stem, tensors)
            encoding = modelopt.ENCODINGS[algorithm.weight]
            columns = _columns(own, encoding, get_format(algorithm.weight), stem)
            asked = INPUTS.get(algorithm.input)
            if algorithm.input.endswith("static scale"):
                number = number_in(_named(own, modelopt.INPUT_SCALE, stem))
                asked = with_static(algorithm.weight, number)
            yield checked(_foreign(stem, get_format(algorithm.weight), asked, encoding, own, columns, {}))


class DeepSeekReader(Reader):
    """Reads FP8 in blocks, as DeepSeek publishes it: a factor for 128 x 128 values, and inputs in runs of 128."""

    method = "fp8"
    _encoding = Renamed(("weight", torch.float8_e4m3fn), ("weight_scale_inv", torch.float32))

    def weights(self, section: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[Foreign]:
        """Yield each quantized weight. Raises: ExchangeError as the class says."""
        if list(section.get("weight_block_size") or ()) != [128, 128]:
            raise ExchangeError(f"its blocks are {section.get('weight_block_size')}; expected [128, 128]")
        format = get_format("fp8_e4m3_128x128")
        for stem in _stems(tensors, ("weight_scale_inv",)):
            own = _own(stem, tensors)
            columns = _columns(own, self._encoding, format, stem)
            asked = INPUTS["fp8, a scale per 128"]
            yield checked(_foreign(stem, format, asked, self._encoding, own, columns, {}))


READERS: dict[str, Reader] = {
    reader.method: reader for reader in (CompressedTensorsReader(), ModelOptReader(), DeepSeekReader())
}


def _foreign(
    stem: str,
    weight: Format,
    asked: Format | None,
    encoding: Renamed,
    own: Mapping[str, Tensor],
    columns: int,
    exact: Mapping[str, float],
) -> Foreign:
    keys = encoding.names(weight.as_weight)
    tensors = {key: _named(own, key, stem) for key in keys}
    known = {*keys, "bias", *_BESIDE}
    if strange := sorted(own.keys() - known):
        raise ExchangeError(f"{own[strange[0]].file}: has {stem}.{strange[0]}, and nothing is known of it")
    beside = tuple(own[key] for key in _BESIDE if key in own)
    return Foreign(stem, weight, asked, encoding, tensors, beside, columns, exact)


_BESIDE = (compressed_tensors.INPUT_DIVISOR, compressed_tensors.INPUT_SCALE, compressed_tensors.SHAPE)


def _stems(tensors: Mapping[str, Tensor], marks: Iterable[str]) -> list[str]:
    """Return the modules that have one of the tensors ``marks``, in the checkpoint's order."""
    found = (name.rpartition(".") for name in tensors)
    return list(dict.fromkeys(stem for stem, _, key in found if key in marks))


def _own(stem: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{stem}."
    found = {name.removeprefix(start): one for name, one in tensors.items() if name.startswith(start)}
    return {key: one for key, one in found.items() if "." not in key}


def _named(own: Mapping[str, Tensor], key: str, stem: str) -> Tensor:
    if key not in own:
        raise ExchangeError(f"{stem}: has no tensor {key}, which its scheme needs")
    return own[key]


def _columns(own: Mapping[str, Tensor], encoding: Renamed, format: Format, stem: str) -> int:
    """Return how many inputs a weight has, by the bytes of a row of codes."""
    codes = _named(own, encoding.codes[0], stem)
    if len(codes.shape) != 2:
        raise ExchangeError(f"{codes.file}: {codes.name} has shape {list(codes.shape)}; expected a matrix")
    count, size = group(format.element.bits)
    return codes.shape[1] * encoding.codes[1].itemsize * count // size


def _scale_dtype(own: Mapping[str, Tensor], encoding: Renamed, stem: str) -> torch.dtype:
    assert encoding.scale is not None
    scale = _named(own, encoding.scale[0], stem)
    if scale.dtype != "BF16":
        raise ExchangeError(f"{scale.file}: {scale.name} is {scale.dtype}; scales of integers are imported in BF16")
    return torch.bfloat16


# --- compressed-tensors


def _group_of(stem: str, section: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the scheme of a module that has codes: the group that names it, or the one that takes its class."""
    groups = list((section.get("config_groups") or {}).values())
    named = [one for one in groups if any(_names(target, stem) for target in one.get("targets") or ())]
    found = named or [one for one in groups if "Linear" in (one.get("targets") or ())]
    if len(found) != 1:
        raise ExchangeError(f"{stem} is quantized, and {len(found)} groups of its config take it; expected one")
    scheme: Mapping[str, Any] = found[0]
    return scheme


def _names(target: str, stem: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), stem) is not None
    return target == stem


def _weight_grid(stem: str, args: Mapping[str, Any]) -> str:
    if args.get("symmetric", True) is not True:
        raise ExchangeError(f"{stem}: its weights have zero points; only symmetric ones can be imported")
    if args.get("actorder") not in _HARMLESS_ORDERS:
        raise ExchangeError(f"{stem}: its columns are in the order of activations ({args['actorder']})")
    for name, known in compressed_tensors.WEIGHTS.items():
        if all(args.get(key) == known.args.get(key) for key in _IDENTITY):
            return name
    said = {key: args[key] for key in _IDENTITY if args.get(key) is not None}
    raise ExchangeError(f"{stem}: its weights are {said}; known are: {', '.join(compressed_tensors.WEIGHTS)}")


def _is_alike(args: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    same = all(args.get(key) == known.get(key) for key in _IDENTITY)
    return same and args.get("dynamic", False) == known["dynamic"]


# --- ModelOpt


def _algorithm(stem: str, section: Mapping[str, Any]) -> modelopt.Algorithm:
    said = section.get("quant_algo")
    if said == modelopt.MIXED:
        layers = section.get("quantized_layers") or {}
        said = next((one.get("quant_algo") for name, one in layers.items() if fnmatchcase(stem, name)), None)
    for one in modelopt.ALGORITHMS:
        if one.name == said:
            return one
    known = ", ".join(one.name for one in modelopt.ALGORITHMS)
    raise ExchangeError(f"{stem}: its algorithm is {said}; known are: {known}")
