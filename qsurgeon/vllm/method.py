"""How vLLM loads and computes a wrapped layer: weights are rounded once, as they arrive, and inputs in each call.

A layer of vLLM may stand for several modules of the checkpoint, its parts: q, k and v, or gate and up. Each part's
weight is rounded by itself, with a tensor scale of its own, as in training. What the layer holds as its ``weight`` is
rounded: an update through the weight's loader is rounded as it comes, and nothing of before is kept.
"""

from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearMethodBase

from qsurgeon.errors import CheckpointError
from qsurgeon.layers import Quantization
from qsurgeon.layers.dequantized import packed_format
from qsurgeon.layers.product import rounded_input, rounded_weight
from qsurgeon.storage import Encoding
from qsurgeon.storage.packed import WEIGHT

if TYPE_CHECKING:
    from qsurgeon.vllm.config import QSurgeonConfig

_QKV = {"q": 0, "k": 1, "v": 2}


@dataclass
class Part:
    """A module of the checkpoint inside a layer. how: None for full precision. rows: where its outputs are.

    received: of a packed weight, the tensors that have come. is_loaded: whether its rows hold a weight.
    """

    name: str
    how: Quantization | None
    rows: slice = field(default_factory=lambda: slice(0))
    received: dict[str, Tensor] = field(default_factory=dict)
    is_loaded: bool = False

    @property
    def rounding(self) -> Quantization | None:
        """How it computes in a rollout; None where a rule rounds in training alone."""
        return None if self.how is None or self.how.behavior.phases == "training" else self.how


class Method(LinearMethodBase):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """How one layer is loaded and computed."""

    def __init__(self, config: "QSurgeonConfig", parts: list[Part]) -> None:
        super().__init__()
        self.config = config
        self.parts = parts

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give ``layer`` its ``weight`` (outputs, inputs), and a name to load each tensor of a packed weight by."""
        sizes = [sum(output_partition_sizes)] if len(self.parts) == 1 else list(output_partition_sizes)
        if len(sizes) != len(self.parts):
            names = ", ".join(part.name for part in self.parts)
            raise CheckpointError(f"vLLM has {len(sizes)} parts in the layer of {names}; expected {len(self.parts)}")
        starts = [sum(sizes[:place]) for place in range(len(sizes))]
        for part, start, size in zip(self.parts, starts, sizes, strict=True):
            part.rows = slice(start, start + size)
        weight = nn.Parameter(torch.zeros(sum(sizes), input_size_per_partition, dtype=params_dtype), False)
        self._register(layer, WEIGHT, weight)
        vars(weight).update(input_dim=1, output_dim=0)
        if (encoding := self.config.record.encoding) is not None:
            hows = [part.how for part in self.parts if part.how is not None and part.how.weight is not None]
            named = {name for how in hows for name in encoding.names(packed_format(how))}
            for name in sorted(named - {WEIGHT}):
                self._register(layer, name, nn.Parameter(torch.empty(0, dtype=torch.uint8), False))

    def _register(self, layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
        def load(_: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
            self.load(layer, name, loaded, shard)

        vars(parameter)["weight_loader"] = load
        layer.register_parameter(name, parameter)

    @torch.no_grad()
    def load(self, layer: nn.Module, name: str, loaded: Tensor, shard: Any = None) -> None:
        """Put a tensor of the checkpoint in its place; shard: of which part it is, as vLLM says it.

        Raises: CheckpointError for a tensor that is not one of a part's, or not of its shape.
        """
        part = self._part(shard)
        encoding = self.config.record.encoding
        if encoding is None or part.how is None or part.how.weight is None:
            self._put(layer, part, loaded)
            return
        part.received[name] = loaded.detach().clone()
        if part.received.keys() == set(encoding.names(packed_format(part.how))):
            self._put_decoded(layer, part, encoding, part.how)

    def _put_decoded(self, layer: nn.Module, part: Part, encoding: Encoding, how: Quantization) -> None:
        weight = layer.get_parameter(WEIGHT)
        decoded = encoding.decode(part.received, packed_format(how), weight.shape[1], weight.dtype).dequantize()
        self._rows(layer, part, decoded).copy_(decoded)
        part.received.clear()
        part.is_loaded = True

    def _put(self, layer: nn.Module, part: Part, loaded: Tensor) -> None:
        weight = layer.get_parameter(WEIGHT)
        rows = self._rows(layer, part, loaded)
        values = loaded.to(device=weight.device, dtype=weight.dtype)
        rows.copy_(values if part.rounding is None else rounded_weight(values, part.rounding))
        part.is_loaded = True

    def _rows(self, layer: nn.Module, part: Part, loaded: Tensor) -> Tensor:
        """Return where a part's weight goes. The output head of vLLM is longer than the vocabulary, with zeros."""
        rows = layer.get_parameter(WEIGHT).data[part.rows]
        if loaded.shape[1:] != rows.shape[1:] or len(loaded) > len(rows):
            raise CheckpointError(
                f"{part.name}.weight has shape {list(loaded.shape)} in the checkpoint; expected {list(rows.shape)}"
            )
        if len(loaded) < len(rows) and not hasattr(layer, "org_vocab_size"):
            raise CheckpointError(f"{part.name}.weight has {len(loaded)} rows in the checkpoint; expected {len(rows)}")
        return rows[: len(loaded)]

    def _part(self, shard: Any) -> Part:
        place = _QKV.get(shard, shard) if isinstance(shard, str) else shard
        if len(self.parts) == 1 and place is None:
            return self.parts[0]
        if not isinstance(place, int) or not 0 <= place < len(self.parts):
            names = ", ".join(part.name for part in self.parts)
            raise CheckpointError(f"vLLM loads part {shard!r} of a layer that stands for {names}")
        return self.parts[place]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that all is there. Raises: CheckpointError with the names of what is not.

        An engine that was started without weights (``load_format="dummy"``) gets them by an update.
        """
        self.config.refuse_untaken()
        missing = [part.name for part in self.parts if not part.is_loaded]
        if missing and get_current_vllm_config().load_config.load_format != "dummy":
            raise CheckpointError(f"the checkpoint has no weight for {', '.join(missing)}")

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return q(x) · q(W)ᵀ + b, (..., outputs), for ``x`` (..., inputs)."""
        weight = layer.get_parameter(WEIGHT)
        runs = [(how, list(parts)) for how, parts in groupby(self.parts, key=lambda part: _input_of(part.rounding))]
        outputs = []
        for _, parts in runs:
            rows = slice(parts[0].rows.start, parts[-1].rows.stop)
            how = parts[0].rounding
            values = x if how is None else rounded_input(x, how, None)
            outputs.append(linear(values, weight[rows], None if bias is None else bias[rows]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Refuse to read a rounded weight as an embedding. Raises: CheckpointError."""
        raise CheckpointError(
            f"{self.parts[0].name} is wrapped, and vLLM ties it to the embedding; say 'untie: true' in the recipe"
        )


def _input_of(how: Quantization | None) -> Any:
    """Return what rounds an input: equal for parts that can share a rounded input."""
    return None if how is None else (how.input_grid, how.rotation)
