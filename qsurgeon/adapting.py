"""An adapter that peft puts on a wrapped layer and that would compute past it is refused, and taken off again.

Importing this module changes ``BaseTuner.inject_adapter``, through which peft puts on all adapters that sit on layers;
``qsurgeon/__init__.py`` imports it right after ``peft.tuners.tuners_utils``.
"""

from contextlib import ExitStack
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from qsurgeon.errors import SurgeryError
from qsurgeon.layers import packed_linears, quant_linears
from qsurgeon.patching import Method, patch
from qsurgeon.surgery import refuse_adapters


class _Before:
    """A model as it is before an adapter is put on it: its modules, what they hold, and which parameters train.

    peft writes into all of these: modules and adapters' settings are kept in dicts of modules, KaSA replaces the data
    of weights, and whatever is not the adapter's is frozen. No tensor is copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._dicts = [
            (held, dict(held))
            for module in model.modules()
            for held in vars(module).values()
            if isinstance(held, dict)  # _modules and _parameters too
        ]
        self._parameters = [(one, one.data, one.requires_grad) for one in model.parameters()]

    def restore(self) -> None:
        """Make the model what it was."""
        for held, before in self._dicts:
            held.clear()
            held.update(before)
        for parameter, data, requires_grad in self._parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)


def _refusing(inject: Method) -> Method:
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not quant_linears(model):
            inject(self, model, adapter_name, *args, **kwargs)
            return
        before = _Before(model)
        with ExitStack() as undo:
            undo.callback(before.restore)
            try:
                inject(self, model, adapter_name, *args, **kwargs)
            except RuntimeError as error:
                # It computes with a weight before it is on the layer, and what fails are the shapes of codes.
                if getattr(self.peft_config[adapter_name], "use_dora", False) and packed_linears(model):
                    raise SurgeryError(
                        "DoRA computes with the weights of what it sits on, and some of these are packed: "
                        "leave use_dora out, or write the base with storage: master"
                    ) from error
                raise
            refuse_adapters(model)
            undo.pop_all()

    return inject_adapter


patch(BaseTuner, "inject_adapter", _refusing)
