"""An adapter that peft would put on a wrapped layer, and that would compute past it, is refused before it is there.

So is merging one into packed weights. Importing this module changes ``BaseTuner.inject_adapter``, through which peft
puts on all adapters that sit on layers, and what it asks before it merges them; ``qsurgeon/__init__.py`` imports it
right after ``peft.tuners.tuners_utils``.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from qsurgeon.errors import SurgeryError
from qsurgeon.layers import PackedLinear, QuantLinear, packed_linears, quant_linears
from qsurgeon.patching import Method, patch
from qsurgeon.references import refuse_an_adapter
from qsurgeon.surgery import objection, refuse_adapters


def _refusing(inject: Method) -> Method:
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        is_wrapped = bool(quant_linears(model))
        if is_wrapped:
            try:
                _check(self, model, self.peft_config[adapter_name])
                refuse_an_adapter(model)
            except SurgeryError:
                _forget(self, model, adapter_name)
                raise
        inject(self, model, adapter_name, *args, **kwargs)
        if is_wrapped:
            refuse_adapters(model)  # for what no config tells; the adapter is on the model then

    return inject_adapter


def _check(tuner: Any, model: nn.Module, config: Any) -> None:
    """Do nothing if adapters of ``config`` call what they sit on. Raises: SurgeryError with the first that would not.

    Nothing of the model, nor of the config, is changed.
    """
    if objection(config, is_packed=True) is None:
        return
    for path, layer in _targets(tuner, model, config):
        how = objection(config, is_packed=isinstance(layer, PackedLinear))
        if how is not None:
            raise SurgeryError(f"{path} cannot have this adapter: {how}")


def _targets(tuner: Any, model: nn.Module, config: Any) -> Iterator[tuple[str, QuantLinear]]:
    """Yield the wrapped layers that peft would put adapters of ``config`` on, as it finds them itself."""
    parameters = tuple(getattr(config, "target_parameters", None) or ())
    for path, layer in packed_linears(model).items() if parameters else ():
        if f"{path}.weight".endswith(parameters):
            yield path, layer
    filled = tuner._prepare_adapter_config(deepcopy(config), tuner.get_model_config(model))
    filled = _maybe_include_all_linear_layers(filled, model)
    for path, _, held in _holding(model):
        if path and isinstance(held, QuantLinear) and tuner._check_target_module_exists(filled, path):
            yield path, held


def _holding(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield each module's path, the module, and what it holds if it is a layer of peft; itself if not."""
    for path, module in model.named_modules():
        yield path, module, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _forget(tuner: Any, model: nn.Module, adapter_name: str) -> None:
    """Take back what was noted of an adapter before it was put on: peft notes its config, transformers that it is."""
    tuner.peft_config.pop(adapter_name, None)
    if getattr(model, "_hf_peft_config_loaded", False) and not getattr(model, "peft_config", None):
        vars(model)["_hf_peft_config_loaded"] = False


def _refusing_codes(check: Method) -> Method:
    def check_merge_allowed(self: Any) -> None:
        check(self)
        for path, layer, held in _holding(self.model):
            if isinstance(held, PackedLinear) and isinstance(layer, BaseTunerLayer) and layer.active_adapters:
                raise SurgeryError(
                    f"the weight of {path}.base_layer is packed, and peft would add {layer.active_adapters[0]!r} to "
                    "its codes: save the adapter, and use qsurgeon merge ADAPTER --output FOLDER"
                )

    return check_merge_allowed


patch(BaseTuner, "inject_adapter", _refusing)
patch(BaseTuner, "_check_merge_allowed", _refusing_codes)  # before merge_adapter, merge_and_unload
