"""What vLLM asks of a quantization: which method computes a layer of the model that it builds. Seen in vLLM 0.32."""

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from qsurgeon.errors import CheckpointError
from qsurgeon.layers import Quantization
from qsurgeon.surgery import QUANT_METHOD, Record, read_record
from qsurgeon.vllm.method import Method, Part

MOST_NAMED = 5


@register_quantization_config(QUANT_METHOD)
class QSurgeonConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """The record of a checkpoint, and what of it the layers that vLLM made have taken.

    Raises, where vLLM would compute otherwise than the trainer does: CheckpointError for fused experts, for noise in
    rollouts, for tensor parallelism, for a LoRA beside merged adapters, and for wrapped modules that no layer took.
    """

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record
        self.hows: Mapping[str, Quantization] = record.quantizations()
        self.taken: set[str] = set()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the config of a ``quantization_config``. Raises: CheckpointError for one that cannot be read."""
        record = read_record(dict(config), "config.json")
        if record.noise is not None and record.noise.during != "training":
            raise CheckpointError(
                "the recipe adds noise to norms in rollouts, which vLLM does not compute; roll out with transformers, "
                "or say 'during: training'"
            )
        return cls(record)

    @classmethod
    def get_name(cls) -> str:
        """Return what ``quant_method`` says."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes that a model can be loaded in: products are computed in the activation's."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return which GPUs can do it: all, since the arithmetic is emulated."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file: the record is in config.json."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the modules as vLLM's model does those of the checkpoint."""
        self.hows = hf_to_vllm_mapper.apply_dict(dict(self.hows))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return how ``layer`` is computed, which is called ``prefix``. Raises: CheckpointError, see the class."""
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            self._refuse_inside(prefix)
            return None
        names = self._parts_of(prefix)
        hows = [self.hows.get(name) for name in names]
        if not any(hows):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        self.taken.update(name for name in names if name in self.hows)
        self._refuse_surroundings(prefix, [how for how in hows if how is not None])
        return Method(self, [Part(name, how) for name, how in zip(names, hows, strict=True)])

    def refuse_untaken(self) -> None:
        """Do nothing if each wrapped module is one that vLLM's model has. Raises: CheckpointError with their names."""
        if missing := [name for name in self.hows if name not in self.taken]:
            raise CheckpointError(
                f"vLLM's model has no layer for {_some(missing)}, which the checkpoint wraps; it would compute in full "
                "precision. Exclude it in the recipe, or roll out with transformers"
            )

    def _parts_of(self, prefix: str) -> list[str]:
        """Return the modules of the checkpoint that a layer stands for: several where vLLM fuses them."""
        if prefix in self.hows:
            return [prefix]  # the checkpoint has them fused, too
        head, _, last = prefix.rpartition(".")
        return [f"{head}.{name}" if head else name for name in self.packed_modules_mapping.get(last, [last])]

    def _refuse_inside(self, prefix: str) -> None:
        """Do nothing if nothing is wrapped inside of a layer that is no Linear, such as fused experts."""
        if wrapped := [name for name in self.hows if name.startswith(f"{prefix}.")]:
            raise CheckpointError(
                f"{_some(wrapped)}: vLLM fuses experts, and the plug-in does not compute fused experts yet; exclude "
                "them in the recipe, or roll out with transformers"
            )

    def _refuse_surroundings(self, prefix: str, hows: list[Quantization]) -> None:
        if get_tensor_model_parallel_world_size() > 1:
            raise CheckpointError(
                f"{prefix}: the plug-in does not split rounded layers between processes yet; use "
                "tensor_parallel_size=1 and several engines (data parallelism)"
            )
        has_adapters = get_current_vllm_config().lora_config is not None
        if has_adapters and any(how.behavior.adapters == "merged" for how in hows):
            raise CheckpointError(
                f"{prefix}: the recipe says 'adapters: merged', so that the trainer rounds W + ΔW; a LoRA request "
                "computes q(W)·q(x) + ΔW·x. Send merged weights, or train with 'adapters: apart'"
            )
        for how in hows:
            if how.input is not None and how.input.as_input.tensor_scale == "tensor":
                raise CheckpointError(
                    f"{prefix}: the input format '{how.input_name}' has a tensor scale of the whole batch, and an "
                    "engine's batches are others than the trainer's; say 'tensor_scale: row' or 'static'"
                )


def _some(names: Iterable[str]) -> str:
    """Return names in a line, a few of them if they are many."""
    every = list(names)
    rest = f" and {len(every) - MOST_NAMED} more" if len(every) > MOST_NAMED else ""
    return ", ".join(every[:MOST_NAMED]) + rest
