"""Refuses peft adapters that would compute past a wrapped layer.

So is one that computes with a packed weight, which the weight itself refuses, and one that would train it. What peft
has done to the model by then is taken back. Merging an adapter into packed weights is refused too. Importing this
module changes ``BaseTuner.inject_adapter``, through which peft puts on all adapters that sit on layers, and what it
asks before it merges them; ``qsurgeon/__init__.py`` imports it right after ``peft.tuners.tuners_utils``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import nn

from qsurgeon.errors import CodesError, SurgeryError
from qsurgeon.hf.references import refuse_an_adapter
from qsurgeon.layers import PackedLayer, QuantLayer, packed_layers, quant_layers
from qsurgeon.patching import Method, patch
from qsurgeon.peft_private import CHECK_MERGE, CREATE, BaseTuner, BaseTunerLayer, filled, is_target
from qsurgeon.surgery import method_of, objection, refuse_adapters
from qsurgeon.transformers_private.attributes import ADAPTED


def _refusing(inject: Method) -> Method:
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not quant_layers(model):
            inject(self, model, adapter_name, *args, **kwargs)
            return
        before, config = _State(model), self.peft_config[adapter_name]
        with _noting(self) as paths:
            try:
                _check(self, model, config)
                _check_saved(model, config)
                refuse_an_adapter(model)
                inject(self, model, adapter_name, *args, **kwargs)
                refuse_adapters(model)  # for what no config tells
            except BaseException as error:
                before.restore()
                _forget(self, model, adapter_name)
                on_packed = bool(paths) and any(f"{one}.".startswith(f"{paths[-1]}.") for one in packed_layers(model))
                if not on_packed or isinstance(error, SurgeryError) or not isinstance(error, Exception):
                    raise
                raise SurgeryError(f"{paths[-1]} cannot have this adapter: {_why(config, error)}") from error

    return inject_adapter


@contextmanager
def _noting(tuner: Any) -> Iterator[list[str]]:
    """Note the paths of the modules that ``tuner`` puts adapters on, each before it does: peft says it nowhere."""
    paths, create = list[str](), getattr(tuner, CREATE)

    def create_and_replace(*args: Any, **kwargs: Any) -> Any:
        paths.append(kwargs.get("current_key", ""))
        return create(*args, **kwargs)

    vars(tuner)[CREATE] = create_and_replace
    try:
        yield paths
    finally:
        del vars(tuner)[CREATE]


def _why(config: Any, error: Exception) -> str:
    """Return why an adapter of ``config`` failed on a packed layer."""
    if isinstance(error, CodesError):
        return f"{method_of(config)} computes with the weight of what it sits on, which is packed"
    return (
        f"{method_of(config)} fails on it ({type(error).__name__}: {error}). Its weight is packed, in torch.uint8: use "
        "a method and an initialization that do not read the weight, or storage: master"
    )


class _State:
    """What modules a model has, what they hold, and which parameters are trained: what peft changes."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(module, self._of(module)) for module in model.modules()]
        self.trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    @staticmethod
    def _of(module: nn.Module) -> dict[str, Any]:
        """Return the attributes of ``module``, and what those are that modules keep others and hooks in."""
        return {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in vars(module).items()}

    def restore(self) -> None:
        """Make all as it was."""
        for module, attributes in self.modules:
            vars(module).clear()
            for name, (value, items) in attributes.items():
                if items is not None:
                    value.clear()
                    value.update(items)
                vars(module)[name] = value
        for parameter, is_trained in self.trained:
            parameter.requires_grad_(is_trained)


def _check_saved(model: nn.Module, config: Any) -> None:
    """Do nothing if no layer that peft would train whole is packed. Raises: SurgeryError with the first that is.

    For classifiers, peft itself adds the heads to ``modules_to_save``.
    """
    names = tuple(getattr(config, "modules_to_save", None) or ())
    for path in packed_layers(model):
        parts = path.split(".")
        above = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        if any(one.endswith(names) for one in above) and names:
            raise SurgeryError(
                f"{path} cannot be trained as modules_to_save ({', '.join(names)}) says: its weight is packed. Exclude "
                "it in the recipe, use storage: master, or leave it out of modules_to_save"
            )


def _check(tuner: Any, model: nn.Module, config: Any) -> None:
    """Do nothing if adapters of ``config`` call what they sit on. Raises: SurgeryError with the first that would not.

    Nothing of the model, nor of the config, is changed.
    """
    if objection(config, is_packed=True) is None:
        return
    for path, layer in _targets(tuner, model, config):
        how = objection(config, is_packed=isinstance(layer, PackedLayer))
        if how is not None:
            raise SurgeryError(f"{path} cannot have this adapter: {how}")


def _targets(tuner: Any, model: nn.Module, config: Any) -> Iterator[tuple[str, QuantLayer]]:
    """Yield the wrapped layers that peft would put adapters of ``config`` on, as it finds them itself."""
    parameters = tuple(getattr(config, "target_parameters", None) or ())
    for path, layer in packed_layers(model).items() if parameters else ():
        if any(f"{path}.{weight.name}".endswith(parameters) for weight in layer.weights):
            yield path, layer
    whole = filled(tuner, deepcopy(config), model)
    for path, _, held in _holding(model):
        if path and isinstance(held, QuantLayer) and is_target(tuner, whole, path):
            yield path, held


def _holding(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield each module's path, the module, and what it holds if it is a layer of peft; itself if not."""
    for path, module in model.named_modules():
        yield path, module, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _forget(tuner: Any, model: nn.Module, adapter_name: str) -> None:
    """Take back what was noted of an adapter before it was put on: peft notes its config, transformers that it is."""
    tuner.peft_config.pop(adapter_name, None)
    if getattr(model, ADAPTED, False) and not getattr(model, "peft_config", None):
        vars(model)[ADAPTED] = False


def _refusing_codes(check: Method) -> Method:
    def check_merge_allowed(self: Any) -> None:
        check(self)
        for path, layer, held in _holding(self.model):
            if isinstance(held, PackedLayer) and isinstance(layer, BaseTunerLayer) and layer.active_adapters:
                raise SurgeryError(
                    f"the weight of {path}.base_layer is packed, and peft would add {layer.active_adapters[0]!r} to "
                    "its codes: save the adapter, and use qsurgeon merge ADAPTER --output FOLDER"
                )

    return check_merge_allowed


patch(BaseTuner, "inject_adapter", _refusing)
patch(BaseTuner, CHECK_MERGE, _refusing_codes)
