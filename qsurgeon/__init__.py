"""Rewrite a Hugging Face model as a recipe says: Linear layers that compute in 4 bits and still train.

Importing the package has three side effects: as soon as transformers' quantizers are imported (at once, if they are
already), ``quant_method: qsurgeon`` is registered with them; as soon as peft is, it refuses adapters that would compute
past wrapped layers; and as soon as the Trainer is, it names its steps to norms that have noise. Below ``qsurgeon run``,
and only there, loaded models are announced too. Nothing else is
imported until it is used, so that ``qsurgeon --help`` answers without torch.
"""

import importlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qsurgeon.launch import VARIABLE
from qsurgeon.version import __version__

if TYPE_CHECKING:
    from qsurgeon.calibration import calibrate, share_scales
    from qsurgeon.checkpoint import rewrite
    from qsurgeon.exchange import export, import_checkpoint
    from qsurgeon.formats import Format, get_format
    from qsurgeon.hf.models import apply, load, plan, reference
    from qsurgeon.layers import QuantLinear, disabled, keep_at_most, kept_bytes, phase, rounded_once
    from qsurgeon.layers.noise import noise
    from qsurgeon.merging import merge
    from qsurgeon.recipe import Recipe, load_recipe
    from qsurgeon.report.inspection import inspect
    from qsurgeon.watch import Watch, WatchCallback

__all__ = [
    "Format",
    "QuantLinear",
    "Recipe",
    "Watch",
    "WatchCallback",
    "__version__",
    "apply",
    "calibrate",
    "disabled",
    "export",
    "get_format",
    "import_checkpoint",
    "inspect",
    "keep_at_most",
    "kept_bytes",
    "load",
    "load_recipe",
    "merge",
    "noise",
    "phase",
    "plan",
    "reference",
    "rewrite",
    "rounded_once",
    "share_scales",
]

_HOME = {
    "Format": "formats",
    "QuantLinear": "layers",
    "Recipe": "recipe",
    "Watch": "watch",
    "WatchCallback": "watch",
    "apply": "hf.models",
    "calibrate": "calibration",
    "disabled": "layers",
    "export": "exchange",
    "get_format": "formats",
    "import_checkpoint": "exchange",
    "inspect": "report.inspection",
    "keep_at_most": "layers",
    "kept_bytes": "layers",
    "load": "hf.models",
    "load_recipe": "recipe",
    "merge": "merging",
    "noise": "layers.noise",
    "phase": "layers",
    "plan": "hf.models",
    "reference": "hf.models",
    "rewrite": "checkpoint",
    "rounded_once": "layers",
    "share_scales": "calibration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qsurgeon' has no attribute '{name}'")
    return getattr(importlib.import_module(f"qsurgeon.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Watch(importlib.abc.MetaPathFinder):
    """Finds nothing itself; imports a module of ours right after the watched one."""

    def __init__(self, watched: str, ours: str) -> None:
        self.watched = watched
        self.ours = ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.watched:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_follow(module: ModuleType) -> None:
                load(module)
                importlib.import_module(self.ours)

            spec.loader.exec_module = load_and_follow  # type: ignore[method-assign]
        return spec


def _follow(watched: str, ours: str) -> None:
    """Import ``ours`` as soon as ``watched`` is imported, at once if it is already."""
    if watched in sys.modules:
        importlib.import_module(ours)
    elif not any(getattr(finder, "ours", None) == ours for finder in sys.meta_path):  # of an import before this one
        sys.meta_path.insert(0, _Watch(watched, ours))


_follow("transformers.quantizers.auto", "qsurgeon.hf.quantizer")
_follow("transformers.modeling_utils", "qsurgeon.hf.hooks")
_follow("transformers.trainer", "qsurgeon.hf.noising")
_follow("peft.tuners.tuners_utils", "qsurgeon.hf.adapting")
_follow("peft.tuners.lora.layer", "qsurgeon.hf.merged")
_follow("peft.mapping_func", "qsurgeon.hf.counting")
_follow("transformers.integrations.liger", "qsurgeon.hf.heads.liger")
_follow("trl.trainer.utils", "qsurgeon.hf.heads.trl")
_follow("trl.trainer.sft_trainer", "qsurgeon.hf.heads.sft")
_follow("trl.trainer.distillation_trainer", "qsurgeon.hf.heads.distilling")
_follow("trl.experimental.async_distillation.async_distillation_trainer", "qsurgeon.hf.heads.distilling_async")
_follow("torch.distributed.fsdp._flat_param", "qsurgeon.layers.flattening")
if VARIABLE in os.environ:
    _follow("transformers.modeling_utils", "qsurgeon.launch.loading")
