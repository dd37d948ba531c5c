"""Fused experts of transformers: the weights of all experts of a block in two parameters, (experts, …)."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qsurgeon.errors import SurgeryError
from qsurgeon.layers.export import refuse_export
from qsurgeon.layers.kinds.kind import Kind
from qsurgeon.layers.layer import QuantLayer, Weight
from qsurgeon.layers.phases import is_active
from qsurgeon.layers.product import quantized_linear
from qsurgeon.layers.quantization import Quantization
from qsurgeon.layers.sharded import is_sharded
from qsurgeon.transformers_private.experts import GATE, PARALLEL, is_experts

GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"


class Experts(nn.Module):
    """What stands for all classes that transformers decorates with ``use_experts_implementation``; none is made of it.

    has_gate: the first product is of gates and ups, in ``gate_up_proj``; without, of ups alone, in ``up_proj``.
    is_transposed: parameters are (experts, inputs, outputs). is_concatenated: all gates come before all ups; otherwise
    they alternate.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum of each token's experts, (tokens, hidden)."""
        raise NotImplementedError


class QuantExperts(QuantLayer):
    """Fused experts, each of which computes what a QuantLinear would for each of its matrices, to the bit.

    Shapes: (tokens, hidden) in and out; ``top_k_index`` and ``top_k_weights`` are (tokens, k). Both products round
    their weight and their input: the tokens that an expert gets, and what its gate makes of them. Gates and ups that
    are stored one after the other are two matrices, each with a tensor scale and two-dimensional blocks of its own, as
    where a checkpoint stores them apart; those that alternate are one. Nothing rounded is kept for the backward pass,
    which rounds the weights again. The model's choice of an experts implementation has no say while it rounds.
    """

    source = Experts
    act_fn: Any
    post_expert_norm: Any
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    is_concatenated: bool
    weights = (Weight(GATE_UP), Weight(DOWN, takes_input=False))

    @classmethod
    def check_all(cls, module: nn.Module, hows: Mapping[str, Quantization]) -> None:
        """Do nothing if ``module`` can be wrapped.

        Raises: SurgeryError also for a part of the experts, a parameter that is not (experts, …, …), and
        two-dimensional blocks that would mix gates and ups.
        """
        super().check_all(module, hows)
        layer: Any = module
        if getattr(module, PARALLEL):
            raise SurgeryError("it holds a part of the experts (expert parallelism), which is not supported")
        for name, how in hows.items():
            shape = tuple(layer.get_parameter(name).shape)
            if len(shape) != 3:
                raise SurgeryError(f"its {name} has shape {list(shape)}; expected (experts, …, …)")
            if name == GATE_UP and not layer.is_concatenated and how.weight and how.weight.is_two_dimensional:
                raise SurgeryError(
                    f"its {name} has gates and ups in turn, which a block of {how.weight.name} would mix; give its "
                    "weight a format without two-dimensional blocks"
                )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum of each token's experts, or what the model's own code returns where nothing rounds.

        Raises: SurgeryError for weights that are split between processes, and an expert that is not there.
        """
        hows = {name: how for name, how in self.quantizations.items() if is_active(self, how.behavior.phases)}
        if not hows:
            source: Any = self.source
            plain: Tensor = source.forward(self, hidden_states, top_k_index, top_k_weights)
            return plain
        refuse_export(self.training)
        first = GATE_UP if self.has_gate else UP
        tensors = {name: self._of_each(name) for name in (first, DOWN)}
        count = len(tensors[DOWN][0])
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        rows = hidden_states[order // top_k_index.shape[-1]]
        counts = chosen.bincount(minlength=count).tolist()
        if len(counts) > count:
            raise SurgeryError(f"{self.name} was asked for expert {len(counts) - 1}; it has {count}")
        done = []
        for expert, x in enumerate(rows.split(counts)):
            if len(x):
                inner = self._product(x, first, expert, tensors[first], hows.get(first))
                inner = getattr(self, GATE)(inner) if self.has_gate else self.act_fn(inner)
                done.append(self._product(inner, DOWN, expert, tensors[DOWN], hows.get(DOWN)))
        out = torch.cat(done) if done else rows
        if self.has_post_expert_norm:
            out = self.post_expert_norm(out)
        out = out * top_k_weights.reshape(-1)[order, None]
        out = out[order.argsort()].view(*top_k_index.shape, out.shape[-1])
        return out.sum(1).to(hidden_states.dtype)

    def _of_each(self, name: str) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Return the matrix and the bias of each expert. One by one, each would get a gradient as large as all."""
        weight = getattr(self, name)
        if is_sharded(weight) or getattr(self, PARALLEL):
            raise SurgeryError(
                f"the {name} of {self.name} is split between processes, which is not supported for fused experts; "
                "exclude it"
            )
        rows = weight.mT if self.is_transposed else weight
        biases = getattr(self, f"{name}_bias").unbind() if self.has_bias else (None,) * len(weight)
        return rows.unbind(), biases

    def _product(
        self,
        x: Tensor,
        name: str,
        expert: int,
        tensors: tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]],
        how: Quantization | None,
    ) -> Tensor:
        weight, bias = tensors[0][expert], tensors[1][expert]
        if how is None:
            return nn.functional.linear(x, weight, bias)
        if name != GATE_UP or not self.is_concatenated:
            return quantized_linear(x, weight, bias, how, name=self.name)
        halves = bias.chunk(2) if bias is not None else (None, None)
        two = zip(weight.chunk(2), halves, strict=True)
        return torch.cat([quantized_linear(x, one, its, how, name=self.name) for one, its in two], dim=-1)


@cache
def _layer(source: type[nn.Module], has_gate: bool, is_transposed: bool) -> type[QuantExperts]:
    """Return the class that modules of ``source`` become."""
    contraction = -2 if is_transposed else -1
    weights = (
        Weight(GATE_UP if has_gate else UP, contraction),
        Weight(DOWN, contraction, takes_input=False),
    )
    own = {"source": source, "weights": weights, "__module__": __name__, "__doc__": QuantExperts.__doc__}
    return type(f"Quant{source.__name__}", (QuantExperts, source), own)


class ExpertsKind(Kind):
    """Fused experts of any class; each class has a kind of its own inside of it."""

    def holds(self, module: nn.Module) -> bool:
        """Return whether ``module`` is of this kind, plain or wrapped."""
        return isinstance(module, QuantExperts) or is_experts(module)

    def of(self, module: nn.Module) -> Kind:
        """Return the kind of ``module``'s own class, with the weights that it has."""
        layer: Any = module
        source: Any = module.source if isinstance(module, QuantExperts) else type(module)
        return ExpertsKind(self.name, _layer(source, layer.has_gate, layer.is_transposed))


EXPERTS = ExpertsKind("Experts", QuantExperts)
