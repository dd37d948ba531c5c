"""One norm: what its noise is, where it is, and where none may be."""

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import qsurgeon
from qsurgeon.errors import SurgeryError, UsageError
from qsurgeon.layers.noise import NoisyNorm, Strength, add_noise, refused, sigma_now
from qsurgeon.layers.noise.normal import key_of, normals

SIZE = 256
KINDS: dict[str, Callable[[], nn.Module]] = {
    "qwen2": lambda: Qwen2RMSNorm(SIZE),
    "llama": lambda: LlamaRMSNorm(SIZE),
    "gemma3": lambda: Gemma3RMSNorm(SIZE),
    "gpt-oss": lambda: GptOssRMSNorm(SIZE),
    "t5": lambda: T5LayerNorm(SIZE),
    "cohere": lambda: CohereLayerNorm(SIZE),
    "layer-norm": lambda: nn.LayerNorm(SIZE),
    "layer-norm-without-bias": lambda: nn.LayerNorm(SIZE, bias=False),
    "rms-norm": lambda: nn.RMSNorm(SIZE),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def noisy(kind: str = "qwen2", sigma: float = 0.01, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """Return a norm with trained weights, and a noise of ``sigma`` at each step."""
    norm = KINDS[kind]()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(SIZE) / 4)
    norm.to(dtype)
    add_noise(norm, Strength(sigma_start=sigma, schedule="constant", **{"during": "both", **fields}), 1.0, "a.norm")
    return norm


def inputs(rows: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(rows, SIZE)).to(dtype)


def effective(norm: Any, x: Tensor, **step: Any) -> Tensor:
    """Return what the weight seems to have gained inside a step, by the outputs: float32, (features,).

    By outputs that are computed exactly: in bfloat16 the outputs without noise are off themselves, by as much as 1e-4
    of a weight in the mean. The normalized input is what another weight changes the output by.
    """
    with torch.no_grad():
        exact: Any = copy.deepcopy(norm).double()
        before = exact(x.double())
        with qsurgeon.noise(norm, **step):
            gained = norm(x).double() - before
        exact.weight.add_(1)
        normal = exact(x.double()) - before
    found: Tensor = ((gained * normal).sum(0) / normal.square().sum(0)).float()
    return found


# --- the numbers


def test_the_numbers_are_normal() -> None:
    values = torch.cat(normals([key_of(0, step, "a") for step in range(64)], [4096] * 64)).double()
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs(values.pow(3).mean()) < 0.02
    assert abs(values.pow(4).mean() - 3) < 0.05
    assert values.abs().max() < 5.8
    shares = [(values.abs() < bound).double().mean().item() for bound in (1, 2, 3)]
    assert shares == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.003)


def test_steps_norms_seeds_and_neighbors_have_nothing_in_common() -> None:
    keys = [key_of(0, 0, "a"), key_of(0, 1, "a"), key_of(0, 0, "b"), key_of(1, 0, "a")]
    found = torch.stack(normals(keys, [65536] * 4))
    apart = torch.corrcoef(found) - torch.eye(4)
    assert apart.abs().max() < 0.02
    for by in (1, 2, 128):
        assert abs(torch.corrcoef(torch.stack([found[0, :-by], found[0, by:]]))[0, 1]) < 0.02


def test_the_numbers_of_a_key_depend_on_nothing_else() -> None:
    key = key_of(7, 3, "model.norm")
    alone, among = normals([key], [5])[0], normals([key_of(7, 3, "other"), key], [9, 8])[1]
    torch.manual_seed(12345)
    assert torch.equal(alone, among[:5])
    assert torch.equal(normals([key], [5])[0], alone)
    # What another version, process or machine has to come to as well.
    assert alone.tolist() == pytest.approx(PINNED, abs=1e-6)


PINNED = [-0.899607956, 0.824082732, 0.690470755, -0.062594317, 1.108377457]


# --- one norm


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_noise_has_its_sigma_in_each_dtype(kind: str, dtype: str) -> None:
    """Also where it is smaller than a step of the weight's dtype: 1e-4, of weights near 1 in bfloat16 (2^-7)."""
    x = inputs(16384, DTYPES[dtype])
    for sigma in (1e-4, 1e-2):
        norm = noisy(kind, sigma, DTYPES[dtype])
        found = effective(norm, x, step=5)
        expected = sigma * normals([key_of(0, 5, "a.norm")], [SIZE])[0]
        assert found.std() == pytest.approx(sigma, rel=0.1)
        assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.95


@each_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_outside_of_a_step_a_norm_is_what_it_was_to_the_bit(kind: str, dtype: str) -> None:
    norm = noisy(kind, 0.1, DTYPES[dtype])
    x = inputs(dtype=DTYPES[dtype])
    state = {name: value.clone() for name, value in norm.state_dict().items()}
    before = type(norm).source.forward(norm, x)
    assert torch.equal(norm(x), before)
    with qsurgeon.noise(norm, step=0):
        inside = norm(x)
    assert not torch.equal(inside, before)
    assert inside.dtype == before.dtype == DTYPES[dtype]
    assert torch.equal(norm(x), before)
    assert norm.state_dict().keys() == state.keys() == KINDS[kind]().state_dict().keys()
    assert all(torch.equal(norm.state_dict()[name], value) for name, value in state.items())


@each_kind
def test_the_gradient_is_that_of_the_noisy_weight(kind: str) -> None:
    norm = noisy(kind, 0.1)
    x = inputs().requires_grad_()
    with qsurgeon.noise(norm, step=2):
        norm(x).square().sum().backward()
    exact: Any = KINDS[kind]()
    exact.load_state_dict(norm.state_dict())
    with torch.no_grad():
        exact.weight.add_(0.1 * normals([key_of(0, 2, "a.norm")], [SIZE])[0])
    y = x.detach().clone().requires_grad_()
    exact(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for (name, one), (_, other) in zip(norm.named_parameters(), exact.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


@pytest.mark.parametrize("kind", ["qwen2", "layer-norm"])
def test_autocast_gives_the_dtype_that_it_gives_without_noise(kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        norm = noisy(kind, 0.1, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            before = norm(inputs(dtype=torch.bfloat16)).dtype
            with qsurgeon.noise(norm, step=0):
                assert norm(inputs(dtype=torch.bfloat16)).dtype == before


def test_a_step_has_its_own_noise_and_the_same_whenever_it_comes() -> None:
    norm, x = noisy(), inputs()
    found = []
    for step in (0, 1, 0):
        with qsurgeon.noise(norm, step=step):
            found.append(norm(x))
            assert torch.equal(norm(x), found[-1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_the_noise_of_many_steps_does_not_add_up() -> None:
    """What writes noise into weights and does not take it back has drifted by ten sigma here."""
    norm, x = noisy(sigma=0.01), inputs(512)
    for step in range(100):
        with qsurgeon.noise(norm, step=step):
            norm(x)
    assert effective(norm, x, step=100).std() == pytest.approx(0.01, rel=0.1)


def test_each_step_has_noise() -> None:
    norm, x = noisy(sigma=0.01), inputs(64)
    for step in range(30):
        assert effective(norm, x, step=step).std() == pytest.approx(0.01, rel=0.15)


def test_a_copy_and_a_pickle_have_the_same_noise() -> None:
    norm, x = noisy(), inputs()
    buffer = io.BytesIO()
    torch.save(norm, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(norm), torch.load(buffer, weights_only=False)]
    with qsurgeon.noise(norm, step=4):
        expected = norm(x)
        assert torch.equal(copies[0](x), norm.source.forward(norm, x))  # another model, which has not begun a step
    for one in copies:
        assert type(one) is type(norm)
        with qsurgeon.noise(one, step=4):
            assert torch.equal(one(x), expected)


# --- where it reaches


@pytest.mark.parametrize(
    ("during", "training", "rollout"), [("both", True, True), ("training", True, False), ("rollout", False, True)]
)
def test_there_is_noise_in_the_phases_of_the_recipe(during: str, training: bool, rollout: bool) -> None:
    norm, x = noisy(during=during), inputs()
    clean = norm(x)
    with qsurgeon.noise(norm, step=1):
        assert (not torch.equal(norm(x), clean), sigma_now(norm) > 0) == (training, training)
        with qsurgeon.phase("rollout"):
            assert (not torch.equal(norm(x), clean), sigma_now(norm) > 0) == (rollout, rollout)
    with qsurgeon.phase("rollout"):
        assert torch.equal(norm(x), clean)


def test_a_thread_that_is_started_inside_has_the_noise_and_another_has_not() -> None:
    norm, x = noisy(), inputs()
    clean = norm(x)
    entered, done = threading.Event(), threading.Event()
    found: dict[str, Tensor] = {}

    def evaluate() -> None:
        entered.wait()
        found["other"] = norm(x)
        done.set()

    other = threading.Thread(target=evaluate)
    other.start()
    with qsurgeon.noise(norm, step=1):
        expected = norm(x)
        entered.set()
        done.wait()
        mine = threading.Thread(target=lambda: found.update(mine=norm(x)))
        mine.start()
        mine.join()
    other.join()
    assert torch.equal(found["other"], clean)
    assert torch.equal(found["mine"], expected)


def test_two_threads_may_be_at_two_steps() -> None:
    norm, x = noisy(), inputs()
    expected = {}
    for step in (1, 2):
        with qsurgeon.noise(norm, step=step):
            expected[step] = norm(x)
    with qsurgeon.noise(norm, step=1):
        with qsurgeon.noise(norm, step=2):
            assert torch.equal(norm(x), expected[2])
        assert torch.equal(norm(x), expected[1])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_computes_again_with_the_noise_of_its_own_step(reentrant: bool) -> None:
    """Also where the next step has begun before backward is called."""
    norm = noisy(sigma=0.3)

    def gradient(*, again: bool) -> tuple[Tensor, Tensor]:
        x = inputs().requires_grad_()
        norm.zero_grad()
        with qsurgeon.noise(norm, step=3):
            y = checkpoint(norm, x, use_reentrant=reentrant) if again else norm(x)
        with qsurgeon.noise(norm, step=4):
            norm(x.detach())
            y.pow(3).sum().backward()
        return x.grad, norm.weight.grad.clone()  # type: ignore[return-value]

    torch.manual_seed(0)
    plain = gradient(again=False)
    torch.manual_seed(0)
    again = gradient(again=True)
    assert torch.equal(plain[0], again[0])
    assert torch.equal(plain[1], again[1])


def test_compiled_code_follows_the_steps_and_compiles_once_for_all_of_them() -> None:
    norm, x = noisy(), inputs()
    compiled: Any = torch.compile(norm, backend="eager", fullgraph=True)
    clean = norm(x)
    assert torch.equal(compiled(x), clean)
    with qsurgeon.noise(norm, step=0):
        assert torch.equal(compiled(x), norm(x))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for step in range(1, 12):
        with qsurgeon.noise(norm, step=step):
            assert torch.equal(compiled(x), norm(x))
            assert not torch.equal(compiled(x), clean)
        assert torch.equal(compiled(x), clean)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_a_decorated_function_has_the_noise_of_its_step() -> None:
    norm, x = noisy(), inputs()
    with qsurgeon.noise(norm, step=9):
        expected = norm(x)
    assert torch.equal(qsurgeon.noise(norm, step=9)(lambda: norm(x))(), expected)


@pytest.fixture
def resting() -> Any:
    norm = KINDS["qwen2"]()
    made = Strength(sigma_start=0.1, sigma_end=0.01, schedule="exponential", stages=4, during="both")
    add_noise(norm, made, 2.0, "a.norm")
    return norm


def test_the_first_stage_has_no_noise_at_all(resting: Any) -> None:
    x = inputs()
    clean = resting(x)
    with qsurgeon.noise(resting, step=0, steps=4):
        assert sigma_now(resting) == 0
        assert torch.equal(resting(x), clean)
        with qsurgeon.noise(resting, step=1, steps=4):
            assert sigma_now(resting) == pytest.approx(0.2)
            assert not torch.equal(resting(x), clean)
        assert torch.equal(resting(x), clean)


def test_the_multiplier_is_of_sigma(resting: Any) -> None:
    assert effective(resting, inputs(64), step=1, steps=4).std() == pytest.approx(0.2, rel=0.1)


def test_a_step_is_checked_when_it_is_named(resting: Any) -> None:
    with pytest.raises(UsageError, match="needs to know steps=: how many there are in all"):
        qsurgeon.noise(resting, step=1)


def test_a_model_without_noise_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        qsurgeon.noise(nn.LayerNorm(8), step=1)
    assert str(caught.value) == (
        "no norm of LayerNorm has noise: apply a recipe with a noise section, or leave out qsurgeon.noise"
    )


# --- what is a norm


class _Scaled(nn.Module):
    """Has a weight of a norm and does not normalize."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class _Rounding(nn.Module):
    """Rounds its weight to bfloat16, in which noise is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.bfloat16() * (x * torch.rsqrt(x.float().square().mean(-1, keepdim=True))).to(x.dtype)


class _Aside(Qwen2RMSNorm):
    """Computes with a weight that it takes from elsewhere than its attribute."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = nn.functional.rms_norm(x, (SIZE,), self._parameters["weight"])
        return result


def replaced() -> Any:
    norm: Any = Qwen2RMSNorm(SIZE)
    norm.forward = norm.forward
    return norm


NO_SCALE = "a {} does not scale what it normalizes"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no-weight": (lambda: nn.LayerNorm(SIZE, elementwise_affine=False), "it has no weight"),
    "linear": (lambda: nn.Linear(4, 4), "it is a Linear, whose weight is no factor for each feature"),
    "scaled": (_Scaled, NO_SCALE.format("_Scaled")),
    "rounding": (_Rounding, NO_SCALE.format("_Rounding")),
    "aside": (lambda: _Aside(SIZE), NO_SCALE.format("_Aside")),
    "batch-norm": (lambda: nn.BatchNorm1d(SIZE), NO_SCALE.format("BatchNorm1d")),
    "replaced": (replaced, "its forward was replaced on the instance, so that noise would have no effect"),
    "double": (lambda: nn.LayerNorm(4).double(), "its weight is torch.float64; expected float32, bfloat16 or float16"),
    "twice": (noisy, "it has noise already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_norm_is_refused(case: str) -> None:
    make, why = REFUSED[case]
    module = make()
    kind = type(module)
    assert refused(module) == why
    with pytest.raises(SurgeryError) as caught:
        add_noise(module, Strength(sigma_start=1, schedule="constant"), 1.0, "it")
    assert str(caught.value) == f"it cannot have noise: {why}"
    assert type(module) is kind


@each_kind
def test_a_norm_on_the_meta_device_is_known_as_one(kind: str) -> None:
    with torch.device("meta"):
        norm = KINDS[kind]()
    assert refused(norm) is None
    assert {one.device.type for one in norm.parameters()} == {"meta"}


def test_a_norm_keeps_its_class_for_whoever_asks() -> None:
    norm = noisy("layer-norm")
    assert {nn.LayerNorm, NoisyNorm} < {*type(norm).__mro__}
    assert type(norm).__name__ == "NoisyLayerNorm"
    assert "noise=×1" in repr(norm)
