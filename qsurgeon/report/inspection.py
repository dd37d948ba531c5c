"""Ask a model, or a folder, what it computes with."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from qsurgeon.hf import record_in, refuse_foreign
from qsurgeon.layers import AS_IT_IS, Quantization, quant_linears
from qsurgeon.report.rows import Report, Row
from qsurgeon.surgery import Excluded, Plan, Step, inventory, plain_model, read_config, skeleton

LARGE = 0.01  # of all parameters: a module that no rule names and that holds more is pointed out


def report_of(plan: Plan, source: str = "") -> Report:
    """Return what a plan will make of a model, as ``inspect`` will show it afterwards."""
    return _report(plan.steps, plan.recipe.storage, source)


def inspect(model: Any) -> Report:
    """Return every module of a live model, a folder or a hub id: what it computes with, and why.

    A live model (inside peft, torch.compile or DDP too) is asked itself: what its layers will do, whatever its
    config says. A folder is read by its config.json alone.

    Raises: CheckpointError for a folder without a model, or a record that cannot be read.
    """
    if isinstance(model, nn.Module):
        return _inspect_live(model)
    config = model if isinstance(model, transformers.PreTrainedConfig) else read_config(model)
    refuse_foreign(config, str(model) if isinstance(model, str | Path) else "the model")
    record = record_in(config)
    fates: dict[str, Excluded | Quantization] = {}
    if record is not None:
        fates |= record.exclusions()
        fates |= record.quantizations()
    steps = [Step(module, fates.get(module.name)) for module in inventory(skeleton(config))]
    return _report(steps, record.storage if record else "", str(model) if isinstance(model, str | Path) else "")


def _inspect_live(model: nn.Module) -> Report:
    record = record_in(getattr(plain_model(model)[1], "config", None))
    excluded = record.exclusions() if record else {}
    wrapped = {path: layer.quantization for path, layer in quant_linears(model).items()}
    steps = [Step(module, wrapped.get(module.path) or excluded.get(module.name)) for module in inventory(model)]
    return _report(steps, record.storage if record else "", "")


def _report(steps: Iterable[Step], storage: str, source: str) -> Report:
    steps = tuple(steps)
    everything = sum(step.module.parameters for step in steps) or 1
    return Report(tuple(_row(step, everything) for step in steps if step.why), storage, source)


def _row(step: Step, everything: int) -> Row:
    module, how = step.module, step.quantization
    stored = 8 * module.bytes / module.parameters if module.parameters else None
    named = how is not None or isinstance(step.fate, Excluded)
    return Row(
        module.name,
        module.kind,
        module.shape,
        how.weight_name if how else AS_IT_IS,
        how.input_name if how else AS_IT_IS,
        how.gradient if how else AS_IT_IS,
        step.why if module.tied_to is None else f"{step.why}; tied to {module.tied_to}",
        module.parameters,
        how.weight.bits if how and how.weight else stored,
        module.bytes,
        module.linear and not module.adapter,
        not named and not module.adapter and module.parameters >= LARGE * everything,
    )
