"""Wrapped models in two processes over gloo: DDP, FSDP2, its state dicts, LoRA under it."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch

import qsurgeon
from qsurgeon.layers import PackedLinear, QuantLinear, packed_layers, quant_layers
from qsurgeon.recipe import load_recipe

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch was built without gloo",
)

WORKER = Path(__file__).parent / "distributed_worker.py"
PROCESSES = 2
RECIPES = ("w4a4-mxfp4", "w4a4-nvfp4")
PACKED = {f"packed-{recipe}": recipe for recipe in RECIPES}
LINEARS = 14

Tensors = dict[str, torch.Tensor]


class Run(NamedTuple):
    """The model that the processes began with, what they wrote, and the batch they shared."""

    folder: Path
    output: Path
    tokens: torch.Tensor

    def read(self, name: str) -> Any:
        return torch.load(self.output / name, weights_only=name != "bfloat16-0.pt")


@pytest.fixture(scope="module")
def worker() -> Any:
    """The worker as a module: what it does to a model in each process, a reference does in one."""
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def base(make_qwen2: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the worker in two processes, on a model of each recipe."""
    base = tmp_path_factory.mktemp("distributed")
    recipes = {name: load_recipe(name) for name in RECIPES}
    recipes |= {name: load_recipe(one).model_copy(update={"storage": "packed"}) for name, one in PACKED.items()}
    for name, recipe in recipes.items():
        (base / name / "output").mkdir(parents=True)
        qsurgeon.apply(recipe, make_qwen2(num_hidden_layers=2)).save_pretrained(base / name / "model")
        tokens = torch.randint(96, (4, 12), generator=torch.Generator().manual_seed(0))
        torch.save(tokens, base / name / "tokens.pt")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    done = subprocess.run([*launch, str(WORKER), str(base)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return base


@pytest.fixture(scope="module", params=RECIPES)
def run(request: pytest.FixtureRequest, base: Path) -> Run:
    return run_in(base / request.param)


@pytest.fixture(scope="module", params=PACKED)
def packed(request: pytest.FixtureRequest, base: Path) -> Run:
    return run_in(base / request.param)


def run_in(folder: Path) -> Run:
    return Run(folder / "model", folder / "output", torch.load(folder / "tokens.pt"))


def mean_gradients(model: Any, tokens: torch.Tensor, worker: Any) -> Tensors:
    """Return the mean of what each process' rows give, computed in this process; the model steps along it."""
    for rows in tokens.chunk(PROCESSES):
        (model(input_ids=rows, labels=rows).loss / PROCESSES).backward()
    torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=worker.LEARNING_RATE).step()
    gradients: Tensors = worker.gradients(model)
    return gradients


@pytest.fixture(scope="module")
def reference(run: Run, worker: Any) -> tuple[Tensors, Tensors]:
    """The gradients of one process, and the parameters after its step."""
    model = qsurgeon.load(run.folder)
    found = mean_gradients(model, run.tokens, worker)
    return found, {name: tensor.detach() for name, tensor in model.state_dict().items()}


def different(one: Tensors, other: Tensors) -> list[str]:
    """Return the names whose tensors are not the same to the bit."""
    assert sorted(one) == sorted(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_gradients_are_bit_identical_to_those_of_one_process(how: str, run: Run, reference: Any) -> None:
    expected, _ = reference
    assert sum(grad.abs().max() > 0 for grad in expected.values()) == len(expected)
    for rank in range(PROCESSES):
        assert different(run.read(f"{how}-{rank}.pt"), expected) == []


def test_gradients_are_those_of_the_whole_batch_in_one_process(run: Run, worker: Any) -> None:
    model = qsurgeon.load(run.folder)
    worker.step(model, run.tokens)
    expected, found = worker.gradients(model), run.read("ddp-0.pt")
    apart = max(((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)
    assert apart < 1e-5  # the rows are summed in another order, in float32


def test_a_full_state_dict_saves_and_reloads_wrapped(run: Run, reference: Any) -> None:
    _, expected = reference
    for load in (qsurgeon.load, type(qsurgeon.load(run.folder)).from_pretrained):
        model = load(run.output / "full")
        assert len(quant_layers(model)) == LINEARS
        assert type(model.model.layers[1].mlp.down_proj) is QuantLinear
        assert different(model.state_dict(), expected) == []


def test_a_sharded_state_dict_loads_into_a_fresh_sharded_model(run: Run, reference: Any) -> None:
    assert different(run.read("fresh.pt"), reference[1]) == []


def test_a_sharded_state_dict_converts_to_one_that_reloads_wrapped(run: Run, reference: Any, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(run.output / "sharded", tmp_path / "whole.pt")
    qsurgeon.load(run.folder).save_pretrained(tmp_path / "model", state_dict=torch.load(tmp_path / "whole.pt"))
    model = qsurgeon.load(tmp_path / "model")
    assert len(quant_layers(model)) == LINEARS
    assert different(model.state_dict(), reference[1]) == []


def test_lora_under_fsdp2_trains_the_adapter_alone(run: Run, worker: Any) -> None:
    check_lora(run, worker)


def check_lora(run: Run, worker: Any) -> None:
    model = worker.adapted(qsurgeon.load(run.folder))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = mean_gradients(model, run.tokens, worker)
    assert len(expected) == 2 * LINEARS
    for rank in range(PROCESSES):
        assert different(run.read(f"lora-{rank}.pt"), expected) == []
    state = run.read("lora-state.pt")
    assert different(state, model.state_dict()) == []
    assert sorted(different(state, before)) == sorted(expected)

    again = peft.PeftModel.from_pretrained(qsurgeon.load(run.folder), run.output / "adapter")
    assert len(quant_layers(again)) == LINEARS
    assert torch.equal(again(run.tokens).logits, model.eval()(run.tokens).logits)


@pytest.mark.parametrize("how", ["ddp", "fsdp2", "each"])
def test_a_watched_step_sees_every_layer_round_and_its_codes_move(how: str, run: Run) -> None:
    for rank in range(PROCESSES):
        numbers = run.read(f"watched-{rank}.pt")[how]
        assert (numbers["qsurgeon/called"], numbers["qsurgeon/active"]) == (1.0, 1.0)
        assert 0 < numbers["qsurgeon/flip_rate"] < 1
        assert all(10 < number < 40 for name, number in numbers.items() if "_sqnr_db" in name)


@pytest.mark.parametrize("how", ["ddp", "fsdp2", "each"])
def test_a_watched_step_on_packed_weights_sees_every_layer_round(how: str, packed: Run) -> None:
    for rank in range(PROCESSES):
        numbers = packed.read(f"watched-{rank}.pt")[how]
        assert (numbers["qsurgeon/called"], numbers["qsurgeon/active"]) == (1.0, 1.0)
        assert not any("flip_rate" in name or "weight_sqnr" in name for name in numbers)


def test_bfloat16_parameters_compute_what_a_bfloat16_model_computes(run: Run) -> None:
    found = run.read("bfloat16-0.pt")
    assert found["seen"] == {(2, torch.bfloat16)}
    model = qsurgeon.load(run.folder, dtype=torch.bfloat16)
    rows = run.tokens.chunk(PROCESSES)[0]
    assert torch.equal(found["logits"], model(rows).logits)
    assert {grad.dtype for grad in found["gradients"].values()} == {torch.float32}
    assert [name for name, grad in found["gradients"].items() if not (grad.isfinite().all() and grad.any())] == []


# --- packed weights


def test_sharded_codes_compute_what_whole_ones_do(packed: Run) -> None:
    model = qsurgeon.load(packed.folder)
    with torch.no_grad():
        for rank, rows in enumerate(packed.tokens.chunk(PROCESSES)):
            assert torch.equal(packed.read(f"logits-{rank}.pt"), model(input_ids=rows).logits)


def test_the_full_state_dict_of_sharded_codes_saves_and_reloads_packed(packed: Run) -> None:
    expected = qsurgeon.load(packed.folder)
    for load in (qsurgeon.load, type(expected).from_pretrained):
        model = load(packed.output / "full")
        assert len(packed_layers(model)) == LINEARS
        assert different(model.state_dict(), expected.state_dict()) == []


def test_the_sharded_state_dict_of_codes_loads_into_a_fresh_model_and_converts(packed: Run, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    expected = qsurgeon.load(packed.folder)
    assert different(packed.read("fresh.pt"), expected.state_dict()) == []
    dcp_to_torch_save(packed.output / "sharded", tmp_path / "whole.pt")
    expected.save_pretrained(tmp_path / "model", state_dict=torch.load(tmp_path / "whole.pt"))
    model = qsurgeon.load(tmp_path / "model")
    assert type(model.model.layers[1].mlp.down_proj) is PackedLinear
    assert different(model.state_dict(), expected.state_dict()) == []


def test_lora_on_packed_weights_under_fsdp2_is_that_of_one_process(packed: Run, worker: Any) -> None:
    check_lora(packed, worker)


def test_lora_on_packed_weights_under_ddp_is_that_of_one_process(packed: Run, worker: Any) -> None:
    expected = mean_gradients(worker.adapted(qsurgeon.load(packed.folder)), packed.tokens, worker)
    assert len(expected) == 2 * LINEARS
    for rank in range(PROCESSES):
        assert different(packed.read(f"lora-ddp-{rank}.pt"), expected) == []


def test_bfloat16_parameters_leave_codes_alone_and_open_them_in_bfloat16(packed: Run) -> None:
    found = packed.read("bfloat16-0.pt")
    assert found["seen"] == {(1, torch.bfloat16)}
    model = qsurgeon.load(packed.folder, dtype=torch.bfloat16)
    assert torch.equal(found["logits"], model(packed.tokens.chunk(PROCESSES)[0]).logits)
