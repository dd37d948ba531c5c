"""What code is told that asks a packed weight for its dtype, by who asks: user code, modules, libraries."""

import copy
import pickle
from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsurgeon.formats import get_format
from qsurgeon.layers import PackedLinear, Quantization
from qsurgeon.layers.codes import plain


def packed(dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16, dtype=dtype)
    PackedLinear.wrap(layer, Quantization(get_format("mxfp4"), None), "proj")
    return layer


def at(place: str, ask: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``ask`` as if it stood in the module ``place``."""
    assert isinstance(ask, FunctionType)
    return FunctionType(ask.__code__, {**ask.__globals__, "__name__": place}, ask.__name__, None, ask.__closure__)


# What makes something in the dtype of a layer's weight, and what its dtype is then.
ASKS: dict[str, Callable[[Any], torch.dtype]] = {
    "weight.dtype": lambda layer: layer.weight.dtype,
    "weight.data.dtype": lambda layer: layer.weight.data.dtype,
    "scale.dtype": lambda layer: layer.weight_scale.dtype,
    "first parameter": lambda layer: next(layer.parameters()).dtype,
    "named parameters": lambda layer: dict(layer.named_parameters())["weight"].dtype,
    "get_parameter": lambda layer: layer.get_parameter("weight").dtype,
    "cast to dtype": lambda layer: torch.ones(2).to(layer.weight.dtype).dtype,
    "cast to weight": lambda layer: torch.ones(2).to(layer.weight).dtype,
    "type_as": lambda layer: torch.ones(2).type_as(layer.weight).dtype,
    "zeros": lambda layer: torch.zeros(2, dtype=layer.weight.dtype).dtype,
    "new_zeros": lambda layer: layer.weight.new_zeros(2).dtype,
    "new_ones": lambda layer: layer.weight.new_ones((2, 2)).dtype,
    "new_empty": lambda layer: layer.weight.new_empty(2).dtype,
    "new_full": lambda layer: layer.weight.new_full((2,), 0.5).dtype,
    "new_tensor": lambda layer: layer.weight.new_tensor([0.5]).dtype,
}
USERS = ["__main__", "my_package.model", "transformers_modules.org.model", "transformers.models.swinv2.modeling_swinv2",
         "peft.tuners.lora.layer", "trl.trainer.sft_trainer"]  # fmt: skip
KEEPERS = ["accelerate.utils.modeling", "safetensors.torch", "torch.distributed.fsdp.api", "huggingface_hub.x",
           "transformers.core_model_loading", "peft.utils.other", "lightning.fabric.utilities"]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ask", ASKS)
def test_code_that_computes_is_told_the_dtype_of_the_values(ask: str, dtype: torch.dtype) -> None:
    layer, master = packed(dtype), nn.Linear(32, 16, dtype=dtype)
    for place in USERS:
        assert at(place, ASKS[ask])(layer) == dtype
    if ask != "scale.dtype":
        assert ASKS[ask](master) == dtype


@pytest.mark.parametrize("place", KEEPERS)
@pytest.mark.parametrize("ask", ["weight.dtype", "weight.data.dtype", "first parameter", "new_zeros", "cast to weight"])
def test_libraries_that_keep_parameters_are_told_of_the_bytes(place: str, ask: str) -> None:
    assert at(place, ASKS[ask])(packed()) == torch.uint8


def test_what_is_taken_out_of_a_parameter_is_bytes() -> None:
    layer = packed()
    for taken in (layer.state_dict()["weight"], layer.weight.detach(), layer.weight[:2], layer.weight.clone()):
        assert taken.dtype == plain(taken).dtype
        assert taken.element_size() == 1


def test_code_that_names_uint8_tells_codes_from_other_parameters() -> None:
    layer = packed()
    assert [name for name, one in layer.named_parameters() if one.dtype == torch.uint8] == ["weight", "weight_scale"]


MOVES: dict[str, Callable[[Any], Any]] = {
    "half": lambda layer: layer.half(),
    "double": lambda layer: layer.double(),
    "to": lambda layer: layer.to(torch.float32),
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "to_empty": lambda layer: layer.to_empty(device="cpu"),
    "load": lambda layer: (layer.load_state_dict(packed().state_dict(), assign=True), layer)[1],
    "compute_in": lambda layer: (layer.compute_in(torch.float16), layer)[1],
}


@pytest.mark.parametrize("how", MOVES)
def test_the_answer_follows_the_layer(how: str) -> None:
    layer = MOVES[how](packed())
    assert layer.weight.dtype == layer.weight_scale.dtype == layer.compute_dtype
    assert layer.compute_dtype == (torch.float16 if how == "compute_in" else layer.bias.dtype)
    assert layer.weight.element_size() == 1


class Casts(nn.Module):
    """Casts what comes in to the dtype of its layer's weight, as T5 does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.proj = layer

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.proj.weight.dtype) + torch.ones(1).to(self.proj.weight)  # type: ignore[arg-type]
        y: Tensor = self.proj(x + next(self.parameters()).new_full((1,), 0.5))
        return y


class Knows(Casts):
    """Casts unless the weight is one of bytes."""

    def forward(self, x: Tensor) -> Tensor:
        if self.proj.weight.dtype != torch.uint8:
            x = x.to(self.proj.weight.dtype)  # type: ignore[arg-type]
        y: Tensor = self.proj(x)
        return y


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize("kind", [Casts, Knows])
def test_modules_compute_the_same_compiled_and_in_one_graph(kind: type[Casts]) -> None:
    model, x = kind(packed()), torch.linspace(-1, 1, 64).reshape(2, 32)
    expected = model(x)
    assert expected.dtype == torch.bfloat16
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
