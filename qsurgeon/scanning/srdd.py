"""The scan that SRDD ("Static Relative Deadzone Detection") does, beside ours: to compare with numbers that exist.

It rounds what comes out of each decoder layer, the residual stream, to MXFP4, though nothing rounds that, and compares
with fixed thresholds. A Gaussian tensor, the best that MXFP4 can meet, fails three of the four; docs/scan.md has more.
The metrics, the thresholds and the keys of the JSON are those of its scanner; what is computed here is in float32.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsurgeon.errors import CalibrationError
from qsurgeon.formats import get_format
from qsurgeon.observing import Seen, observed, undisturbed
from qsurgeon.scanning.data import Batch, Examples
from qsurgeon.scanning.unfinished import Unfinished

FORMAT = "mxfp4"
THRESHOLDS = {"sqnr_threshold_db": 20.0, "deadzone_threshold": 0.05, "saturation_threshold": 0.01,
              "relative_error_threshold": 0.10}  # fmt: skip
METRICS = ("sqnr_db", "deadzone_ratio", "saturation_ratio", "relative_error")
REFERENCE_ONLY = ("mean_abs_error", "max_abs_error", "output_norm")
_TINY = 1e-10  # below which its scanner takes a value for zero
_LOSSLESS = 100.0  # dB, where nothing was lost
# By the share of layers that are called problematic.
_FEW, _MANY = 0.1, 0.3


def metrics_of(x: Tensor) -> dict[str, float]:
    """Return the metrics of a tensor (…, columns) that is rounded to MXFP4."""
    x = x.float()
    q = get_format(FORMAT).as_weight.fake_quantize(x)
    error = q - x
    noise = error.square().mean().item()
    magnitude = x.abs()
    return {
        "sqnr_db": 10 * torch.log10(x.square().mean() / noise).item() if noise else _LOSSLESS,
        "deadzone_ratio": ((magnitude > _TINY) & (q.abs() < _TINY)).float().mean().item(),
        "saturation_ratio": (q.abs() >= 0.99 * q.abs().amax()).float().mean().item(),
        "relative_error": (error.abs() / (magnitude + _TINY)).mean().item(),
        "mean_abs_error": error.abs().mean().item(),
        "max_abs_error": error.abs().amax().item(),
        "output_norm": x.norm().item(),
    }


def issues_of(metrics: Mapping[str, float]) -> list[str]:
    """Return which thresholds the metrics of a layer are beyond, in the scanner's words."""
    limits = dict(zip(METRICS, THRESHOLDS.values(), strict=True))
    found = []
    if metrics["sqnr_db"] < limits["sqnr_db"]:
        found.append(f"low_sqnr={metrics['sqnr_db']:.1f}dB")
    for name, word in (
        ("deadzone_ratio", "high_deadzone"),
        ("saturation_ratio", "high_saturation"),
        ("relative_error", "high_relative_error"),
    ):
        if metrics[name] > limits[name]:
            found.append(f"{word}={metrics[name]:.1%}")
    return found


def srdd(model: nn.Module, examples: Examples, source: str, unfinished: Unfinished, done: Callable[[], None]) -> Any:
    """Return what SRDD's scanner writes of ``model``, on ``examples``; ``done`` is called after each batch.

    Each metric is the mean over samples. Raises: CalibrationError for a model without a list of layers.
    """
    layers = residual_layers(model)
    sums: list[dict[str, float]] = []
    for number, batch in enumerate(examples.batches):
        unit = f"srdd batch {number}"
        found = unfinished.found(unit)
        if found is None:
            found = _of_batch(model, layers, batch)
            unfinished.add(unit, found)
        sums = found if not sums else [{k: one[k] + two[k] for k in one} for one, two in zip(sums, found, strict=True)]
        done()
    means = [{name: value / examples.samples for name, value in one.items()} for one in sums]
    return _report(means, source)


def residual_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's longest list of layers, by their names. Raises: CalibrationError if it has none."""
    lists = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList) and len(one) > 0]
    if not lists:
        raise CalibrationError(f"{type(model).__name__} has no list of layers, whose outputs SRDD rounds")
    name, longest = max(lists, key=lambda one: len(one[1]))
    return {f"{name}.{number}": layer for number, layer in enumerate(longest)}


def _of_batch(model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch) -> list[dict[str, float]]:
    """Return for each layer the sum of each metric over the samples of a batch."""
    found: dict[str, dict[str, float]] = {}

    def see(call: Seen[nn.Module]) -> None:
        output: Any = call.output
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        for sample in hidden:
            for name, value in metrics_of(sample).items():
                sums = found.setdefault(call.name, {})
                sums[name] = sums.get(name, 0.0) + value

    with observed(layers, see), undisturbed(model):
        model(**batch.inputs)
    missing = [name for name in layers if name not in found]
    if missing:
        raise CalibrationError(f"{missing[0]} is not called on this data, so that SRDD has nothing to round there")
    return [found[name] for name in layers]


def _report(layers: Sequence[Mapping[str, float]], source: str) -> dict[str, Any]:
    issues = [issues_of(one) for one in layers]
    bad = [place for place, one in enumerate(issues) if one]
    return {
        "config": {"model_path": source, "quant_type": FORMAT, "num_layers": len(layers), "thresholds": THRESHOLDS},
        "report": {
            "summary": {
                "total_layers": len(layers),
                "problematic_layers": len(bad),
                "healthy_layers": len(layers) - len(bad),
                "problematic_layer_ids": bad,
            },
            "statistics": {name: _statistics([one[name] for one in layers]) for name in METRICS},
            "per_layer": [
                {"layer_id": place, **one, "is_problematic": bool(issues[place]), "issues": issues[place]}
                for place, one in enumerate(layers)
            ],
        },
        "recommendations": _recommendations(bad, len(layers)),
        "timestamp": None,  # the same scan has the same bytes
    }


def _statistics(values: Sequence[float]) -> dict[str, float]:
    std = statistics.pstdev(values)
    return {"min": min(values), "max": max(values), "mean": statistics.fmean(values), "std": std}


def _recommendations(bad: list[int], layers: int) -> dict[str, Any]:
    share = len(bad) / layers
    strategy, details = (
        ("mixed_precision", "keep the problematic layers in higher precision")
        if share < _FEW
        else ("hybrid", "keep the worst layers in higher precision, and add noise to the others")
        if share <= _MANY
        else ("reconsider_quantization", "more than 30% of the layers are problematic")
    )
    return {
        "strategy": strategy,
        "details": details,
        "aqn_layers": bad if strategy == "hybrid" else [],
        "mixed_precision_layers": bad if strategy == "mixed_precision" else [],
    }
