"""Which code takes a weight itself: found in the source of modules, and compared with what they do when they run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

import qsurgeon
from qsurgeon.errors import PlanError
from qsurgeon.recipe import Recipe
from qsurgeon.surgery.reads import weight_readers


class Holder(nn.Module):
    """Holds a Linear, and takes it as a subclass says."""

    layers: Any
    named: Any
    inner: Any

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.Linear(32, 32)
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])
        self.named = nn.ModuleDict({"a": nn.Linear(32, 32)})
        self.inner = nn.Sequential(nn.Linear(32, 32))
        self.wide = False

    def helped(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return x @ layer.weight.T

    @staticmethod
    def fixed(x: Tensor, layer: nn.Linear) -> Tensor:
        return functional.linear(x, layer.weight)


def product(x: Tensor, layer: Any, scale: float = 1.0) -> Tensor:
    return scale * functional.linear(x, layer.weight, layer.bias)


def through(x: Tensor, layer: Any) -> Tensor:
    return product(x, scale=2.0, layer=layer)


class Direct(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.held.weight, self.held.bias)


class Named(Holder):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.held
        weight = layer.weight
        return x @ weight.t()


class Looped(Holder):
    def forward(self, x: Tensor) -> Tensor:
        for at, layer in enumerate(self.layers):
            x = x @ layer.weight + at
        return x


class Listed(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cat([layer.weight for layer in self.layers[:1]])


class Indexed(Holder):
    def forward(self, x: Tensor) -> Any:
        return x @ self.layers[1].weight


class Keyed(Holder):
    def forward(self, x: Tensor) -> Any:
        return x @ sum(one.weight for one in self.named.values())


class Nested(Holder):
    def forward(self, x: Tensor) -> Any:
        return x @ self.inner[0].weight.data


class Method(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.helped(x, self.held)


class Static(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return self.fixed(x, layer=self.held)


class Function(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return through(x, self.held)


class Inherited(Direct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Asked(Holder):
    def forward(self, x: Tensor) -> Any:
        return x @ getattr(self.held, "weight")  # noqa: B009


class First(Holder):
    def forward(self, x: Tensor) -> Tensor:
        return x @ next(self.held.parameters())


class Configured(Holder):
    def forward(self, x: Tensor) -> Any:
        if not self.wide:
            return x @ self.held.weight
        return self.held(x)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Method()

    def forward(self, x: Tensor) -> Any:
        return self.part.helped(x, self.part.layers[0]) + self.project(x)

    def project(self, x: Tensor) -> Any:
        return x @ self.part.inner[0].weight


VALUES: dict[type[nn.Module], set[str]] = {
    Direct: {"held"},
    Named: {"held"},
    Looped: {"layers.0", "layers.1"},
    Listed: {"layers.0", "layers.1"},  # of a slice, any may be meant
    Indexed: {"layers.0", "layers.1"},
    Keyed: {"named.a"},
    Nested: {"inner.0"},
    Method: {"held"},
    Static: {"held"},
    Function: {"held"},
    Inherited: {"held"},
    Asked: {"held"},
    First: {"held"},
    Configured: {"held"},
    Outer: {"part.inner.0", "part.held"},
}


@pytest.mark.parametrize("kind", VALUES, ids=lambda one: one.__name__)
def test_code_that_computes_with_a_weight_is_found(kind: type[nn.Module]) -> None:
    model = kind()
    model(torch.ones(1, 32))  # what the classes above say is code that runs
    found = weight_readers(model)
    assert found.keys() == VALUES[kind]
    for readers in found.values():
        assert all(one.takes_values and one.certain and one.misreads_codes for one in readers)


class Called(Holder):
    def forward(self, x: Tensor) -> Any:
        for layer in (*self.layers, self.held):
            x = layer(x)
        if hasattr(self.held, "weight") and isinstance(self.held.weight, Tensor) and self.held.weight is not None:
            x = x + self.held.weight.ndim
        return self.inner(x).to(self.held.weight.device)


class Unused(Holder):
    def forward(self, x: Tensor) -> Any:
        if self.wide:
            return x @ self.held.weight
        return self.held(x) if self.wide is False else x @ self.held.weight

    def helped(self, x: Tensor, layer: nn.Linear) -> Tensor:  # nothing calls it
        return x @ self.held.weight


@pytest.mark.parametrize("kind", [Called, Unused])
def test_code_that_calls_its_layers_is_left_alone(kind: type[nn.Module]) -> None:
    readers = [one for found in weight_readers(kind()).values() for one in found]
    assert not any(one.takes_values or one.misreads_codes for one in readers)


class Cast(Holder):
    def forward(self, x: Tensor) -> Any:
        return self.held(x.to(self.held.weight.dtype))


class CastToFirst(Holder):
    def forward(self, x: Tensor) -> Any:
        return self.held(x.to(next(self.held.parameters()).dtype))


class Knowing(Holder):
    def forward(self, x: Tensor) -> Any:
        if self.held.weight.dtype != torch.uint8:
            x = x.to(self.held.weight.dtype)
        return self.held(x)


class Measured(Holder):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.held(x)
        return y / self.held.weight.shape[1]


@pytest.mark.parametrize(("kind", "misreads"), [(Cast, 0), (CastToFirst, 0), (Knowing, 0), (Measured, 1)])
def test_code_that_asks_a_weight_what_codes_answer_otherwise_misreads_them(
    kind: type[nn.Module], misreads: int
) -> None:
    readers = [one for found in weight_readers(kind()).values() for one in found]
    assert [one.misreads_codes for one in readers if one.misreads_codes] == [True] * misreads
    assert not any(one.takes_values for one in readers)


def test_a_plan_names_what_misreads_codes() -> None:
    with pytest.raises(PlanError) as caught:
        qsurgeon.apply(recipe("packed", ["named", "layers", "inner"]), Measured())
    assert str(caught.value) == (
        "rules[0]: rule 'rule 1' reaches held: Measured.forward asks the weight for its shape, which differs once it "
        "is packed; exclude 'held', or say 'storage: master'"
    )


class Sometimes(Holder):
    def forward(self, x: Tensor) -> Any:
        if x.shape[0] > 1:
            return self.held(x)
        return x @ self.held.weight


def test_what_depends_on_the_call_is_not_certain() -> None:
    (reader,) = weight_readers(Sometimes())["held"]
    assert (reader.where, reader.certain) == ("Sometimes.forward", False)


# --- in a plan

TINY: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "T5": (
        hf.T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4),
        hf.T5ForConditionalGeneration,
    ),
    "WavLM": (
        hf.WavLMConfig(vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
            conv_dim=[32], conv_kernel=[4], conv_stride=[4], num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4),
        hf.WavLMForCTC,
    ),
    "Mamba": (
        hf.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, state_size=16, time_step_rank=8),
        hf.MambaForCausalLM,
    ),
    "FalconMamba": (
        hf.FalconMambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, state_size=16, time_step_rank=8),
        hf.FalconMambaForCausalLM,
    ),
}  # fmt: skip
WAVLM = (
    "rules[0]: rule 'rule 1' reaches wavlm.encoder.layers.0.attention.k_proj and 3 more: "
    "WavLMAttention.torch_multi_head_self_attention takes the weight itself and computes with it; exclude "
    "'attention.k_proj', 'attention.v_proj', 'attention.q_proj', 'attention.out_proj'"
)
DT_PROJ = (
    "rules[0]: rule 'rule 1' reaches backbone.layers.0.mixer.dt_proj: MambaMixer.forward takes the weight itself and "
    "computes with it; exclude 'mixer.dt_proj'"
)


def recipe(storage: str, exclude: list[str]) -> Recipe:
    rule = {"target": ["**"], "exclude": ["lm_head?", *exclude], "weight": "mxfp4", "input": "mxfp4"}
    return Recipe.model_validate({"version": 1, "storage": storage, "rules": [rule]})


@pytest.mark.filterwarnings("ignore:.*mamba_inner_fn is handed:UserWarning")
@pytest.mark.parametrize(
    ("name", "storage", "exclude", "message"),
    [
        ("T5", "packed", [], ""),
        ("T5", "master", [], ""),
        ("WavLM", "master", ["attention.{q,k,v,out}_proj"], WAVLM),
        ("WavLM", "packed", ["attention.{q,k,v,out}_proj"], WAVLM),
        ("Mamba", "packed", ["mixer.dt_proj"], DT_PROJ),
        ("Mamba", "master", ["mixer.dt_proj"], DT_PROJ),
        ("FalconMamba", "packed", [], ""),
        ("FalconMamba", "master", [], ""),
    ],
)
def test_a_plan_names_what_would_be_computed_past(name: str, storage: str, exclude: list[str], message: str) -> None:
    config, kind = TINY[name]
    if message:
        with pytest.raises(PlanError) as caught:
            qsurgeon.apply(recipe(storage, []), kind(config))
        assert str(caught.value) == message
    model = kind(config)
    qsurgeon.apply(recipe(storage, exclude), model)
    assert qsurgeon.inspect(model).wrapped


def test_a_plan_remarks_what_may_be_computed_past() -> None:
    remark = "Sometimes.forward takes its weight itself in some calls, unrounded"
    with pytest.warns(UserWarning, match=f"^held: {remark}$"):
        qsurgeon.apply(recipe("master", []), Sometimes())
    plan = qsurgeon.plan(recipe("master", []), Sometimes())
    assert plan.remarks == (f"held: {remark}",)
    assert [step.why for step in plan.wrapped if step.remark] == [f"rule 'rule 1'; {remark}"]


@pytest.mark.parametrize("storage", ["master", "packed"])
def test_a_plan_remarks_what_is_handed_to_where_a_kernel_may_stand(storage: str) -> None:
    config, kind = TINY["Mamba"]
    remark = "mamba_inner_fn is handed its weight, and a kernel in the place of that computes with it, unrounded"
    with pytest.warns(UserWarning, match=f"^backbone.layers.0.mixer.x_proj and 1 more: {remark}$"):
        qsurgeon.apply(recipe(storage, ["mixer.dt_proj"]), kind(config))


@pytest.mark.filterwarnings("ignore:.*mamba_inner_fn is handed:UserWarning")
@pytest.mark.parametrize("name", TINY)
def test_shipped_recipes_leave_out_what_nothing_calls(name: str) -> None:
    config, kind = TINY[name]
    if name == "WavLM":
        with pytest.raises(PlanError, match="torch_multi_head_self_attention takes the weight itself"):
            qsurgeon.plan("w4a4-mxfp4", kind(config))
        return
    steps = qsurgeon.plan("w4a4-mxfp4", kind(config)).wrapped
    assert steps
    assert not any(reader.certain and reader.takes_values for step in steps for reader in step.module.readers)


class Never(Holder):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            return x @ self.held.weight
        bias = self.held.bias.float()
        y: Tensor = functional.linear(x, self.held.weight, bias) + self.layers[0](x)
        return y


class ByName(Holder):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.held if x.shape[0] > 1 else self.layers[0]
        return layer(x) if x.shape[1] > 1 else x @ self.held.weight


class Passed(Holder):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            return x @ self.held.weight
        return torch.utils.checkpoint.checkpoint(self.held, x, use_reentrant=False)  # type: ignore[no-any-return]


class Elsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Sometimes()
        self.held = self.inner.held

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner.held.forward(self.inner(x))
        return y


@pytest.mark.parametrize(
    ("kind", "path", "certain"),
    [
        (Sometimes, "held", {False}), (Never, "held", {True}), (ByName, "held", {False}), (Passed, "held", {False}),
        (Elsewhere, "inner.held", {False}), (Indexed, "layers.1", {True}),
    ],
)  # fmt: skip
def test_what_nothing_calls_is_computed_past_whenever_it_is_taken(
    kind: type[nn.Module], path: str, certain: set[bool]
) -> None:
    model = kind()
    for rows in (1, 2):
        model(torch.ones(rows, 32))
    assert {one.certain for one in weight_readers(model)[path]} == certain


def test_the_fast_path_of_torch_is_seen() -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64)
    found = weight_readers(layer)
    assert {"linear1", "linear2"} <= found.keys()
    assert not any(one.certain for one in found["linear1"])
