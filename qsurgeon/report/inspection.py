"""Ask a model or a folder what it computes with."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import transformers
from torch import nn

from qsurgeon.arguments import check_model
from qsurgeon.checkpoint import config_of
from qsurgeon.layers import AS_IT_IS, Quantization, current_phase, is_active, packed_layers, quant_layers
from qsurgeon.layers.noise import Noise, noisy_norms, sigma_now
from qsurgeon.observing import observed, undisturbed
from qsurgeon.report.rows import Report, Row, mark_large
from qsurgeon.storage import MASTER
from qsurgeon.surgery import (
    Excluded,
    Plan,
    Step,
    bypassed,
    exclusions,
    inventory,
    misread,
    noise_in,
    quantizations,
    record_in,
    refuse_foreign,
    skeleton,
)

NOT_CALLED = "never called by the example: its parent computes past it"
NONE: Mapping[str, str] = MappingProxyType({})


def report_of(plan: Plan, source: str = "") -> Report:
    """Return what a plan will make of a model, as ``inspect`` will show it afterwards."""
    report = _report(plan.steps, plan.recipe.storage, source)
    return replace(report, bytes_after=report.bytes + plan.growth, noise=_in_words(plan.noise))


def inspect(
    model: Any,
    example: Mapping[str, Any] | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Return every module of a live model, a folder or a hub id: what it computes with, and why.

    ``example``: what to call a live model with (``{"input_ids": …}``). Then a layer that is wrapped and was not called
    is said to be: its parent may read the weight itself and compute past it. Of peft's adapters that do that, it is
    known without an example.

    A live model (inside peft, torch.compile or DDP too) is asked itself: what its layers will do, whatever its
    config says. A folder is read by its config.json alone; of a hub id nothing else is downloaded. ``revision``: a
    branch, a tag or a commit of a hub id. ``trust_remote_code``: run the code that the model brings with it.

    Raises: CheckpointError for a folder without a model, or a record that cannot be read; ConnectionError if the hub
    is out of reach.
    """
    check_model("inspect", model, transformers.PreTrainedConfig)
    if isinstance(model, nn.Module):
        return _inspect_live(model, example)
    is_config = isinstance(model, transformers.PreTrainedConfig)
    config = model if is_config else config_of(model, revision, trust_remote_code=trust_remote_code)
    refuse_foreign(config, str(model) if isinstance(model, str | Path) else "the model")
    record = record_in(config)
    fates: dict[str, Excluded | Quantization] = {}
    if record is not None:
        fates |= record.exclusions()
        fates |= record.quantizations()
    noisy = {} if record is None or record.noise is None else record.noise.modules
    steps = [
        Step(module, fates.get(module.name), noisy.get(module.name))
        for module in inventory(skeleton(config, trust_remote_code))
    ]
    if record is not None and record.encoding is not None:
        sizes = [step.packed_bytes(record.encoding) for step in steps]
        steps = [
            replace(step, module=replace(step.module, bytes=size)) for step, size in zip(steps, sizes, strict=True)
        ]
    report = _report(steps, record.storage if record else "", str(model) if isinstance(model, str | Path) else "")
    return report if record is None else replace(report, noise=_in_words(record.noise))


def _in_words(noise: Noise | None) -> str:
    return "" if noise is None else str(noise)


def _inspect_live(model: nn.Module, example: Mapping[str, Any] | None) -> Report:
    excluded = exclusions(model)
    layers = quant_layers(model)
    wrapped = quantizations(model)
    noise, sigmas = noise_in(model), {path: sigma_now(norm) for path, norm in noisy_norms(model).items()}
    noisy = {} if noise is None else noise.modules
    steps = [
        Step(module, wrapped.get(module.name) or excluded.get(module.name), noisy.get(module.name))
        for module in inventory(model)
    ]
    called = None if example is None else _called(model, example)
    packed = packed_layers(model)
    storage = next((one.encoding.name for one in packed.values()), MASTER if layers else "")
    resting = {
        step.module.name
        for step in steps
        for how, layer in [(step.quantization, layers.get(step.module.path))]
        if how is not None and layer is not None and step.module.path not in packed
        if not is_active(layer, how.behavior.phases)
    }
    report = _report(steps, storage, "", called, bypassed(model), misread(model))
    rows = [replace(row, rounds=row.module not in resting) if row.module in wrapped else row for row in report.rows]
    now = {step.module.name: sigmas.get(step.module.path) for step in steps if step.noise is not None}
    rows = [_with_sigma(row, now[row.module]) if row.module in now else row for row in rows]
    return replace(report, rows=tuple(rows), phase=current_phase(), noise=_in_words(noise))


def _with_sigma(row: Row, sigma: float | None) -> Row:
    """Return the row of a norm that says which noise it has at this moment."""
    return replace(row, sigma=sigma, why=f"{row.why}, sigma {sigma:.3g} at this moment" if sigma else row.why)


def _called(model: nn.Module, example: Mapping[str, Any]) -> set[str]:
    """Return the paths of the wrapped layers that ``model`` calls when it is called with ``example``."""
    called: set[str] = set()
    with observed(quant_layers(model), lambda call: called.add(call.name)), undisturbed(model):
        model(**example)
    return called


def _report(
    steps: Iterable[Step],
    storage: str,
    source: str,
    called: set[str] | None = None,
    past: Mapping[str, str] = NONE,
    wrong: Mapping[str, str] = NONE,
) -> Report:
    shown = [step for step in steps if step.why]
    undecided = [step.fate is None and not step.module.adapter for step in shown]
    rows = mark_large([_row(step, called, past, wrong) for step in shown], undecided)
    return Report(tuple(rows), storage, source)


def _row(step: Step, called: set[str] | None, past: Mapping[str, str], wrong: Mapping[str, str]) -> Row:
    module, how = step.module, step.quantization
    was_called = None if called is None or how is None else module.path in called
    stored = 8 * module.bytes / module.parameters if module.parameters else None
    remarks = [step.why]
    if module.tied_to is not None:
        remarks.append(f"tied to {module.tied_to}")
    if module.path in past:
        remarks.append(past[module.path])
    elif module.path in wrong:
        remarks.append(wrong[module.path])
    elif was_called is False:
        remarks.append(NOT_CALLED)
    return Row(
        module.name,
        module.kind,
        module.shape,
        how.weight_name if how else AS_IT_IS,
        how.input_name if how else AS_IT_IS,
        how.behavior if how else None,
        "; ".join(remarks),
        module.parameters,
        how.weight.bits if how and how.weight else stored,
        module.bytes,
        module.type,
        was_called,
        bypassed=module.path in past,
        misread=module.path in wrong,
        adapter=module.adapter,
        tower=module.tower,
        noise=step.noise,
    )
