"""LoRA on a layer whose rule says ``adapters: merged``: it computes q(W + ΔW)·q(x), as an engine with merged weights.

Importing this module changes ``forward`` of peft's LoRA of a Linear; ``qsurgeon/__init__.py`` imports it right after
``peft.tuners.lora.layer``. ΔW is what peft itself would merge, so that ``merge_adapter`` changes no output.
"""

from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor

from qsurgeon.errors import UsageError
from qsurgeon.layers import QuantProduct
from qsurgeon.layers.added import Added
from qsurgeon.patching import Method, patch
from qsurgeon.surgery import merges


def _merging(forward: Method) -> Method:
    def merging_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        base = self.base_layer
        if not isinstance(base, QuantProduct) or not merges(base) or self.disable_adapters or self.merged:
            return forward(self, x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            raise UsageError(
                f"{base.name or 'a layer'}: a batch with an adapter for each row (adapter_names) cannot be computed "
                "under adapters: merged, where one weight is rounded for all rows; call the model once for each adapter"
            )
        return base(x, *args, added=_added(self), **kwargs)

    return merging_forward


def _added(layer: Any) -> Added:
    """Return what the active adapters of a layer of peft add to the weight that it holds."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    sources = tuple(one[name].weight for name in names for one in (layer.lora_A, layer.lora_B))
    scales = tuple(float(layer.scaling[name]) for name in names)
    return Added(lambda: [layer.get_delta_weight(name) for name in names], sources, scales)


patch(Linear, "forward", _merging)
