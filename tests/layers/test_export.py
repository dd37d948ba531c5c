"""A wrapped layer goes into a torch.export program, and not where its rounding or its gradient would be lost."""

import io
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsurgeon
from qsurgeon.errors import ExportError

ADVICE = (
    "torch.export.export keeps what it computes; with storage: master, `with qsurgeon.disabled(model)` exports it in "
    "full precision"
)
X = torch.linspace(-3, 3, 128).reshape(2, 64)

# torch's own, of an autograd.Function in a graph
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
storages = pytest.mark.parametrize("storage", ["master", "packed"])


def wrapped(storage: str, weight: str = "mxfp4", input: str | None = "mxfp4") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8))
    rules = [{"target": ["**"], "weight": weight, "input": input}]
    qsurgeon.apply(qsurgeon.Recipe.model_validate({"version": 1, "storage": storage, "rules": rules}), model)
    return model.eval()


@storages
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize(("weight", "input"), [("mxfp4", "mxfp4"), ("nvfp4", None)])
def test_an_exported_model_computes_the_same_to_the_bit(
    storage: str, strict: bool, grad: bool, weight: str, input: str | None
) -> None:
    model = wrapped(storage, weight, input)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (X,), strict=strict)
    for x in (X, 3 * X + 1):
        assert torch.equal(program.module()(x), model(x))


@storages
def test_an_exported_model_can_be_saved_and_takes_other_batches(storage: str) -> None:
    model = wrapped(storage)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    with torch.no_grad():
        program = torch.export.export(model, (X,), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.randn(5, 64)
    assert torch.equal(torch.export.load(file).module()(x), model(x))


@storages
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_a_program_that_would_be_trained_is_refused(storage: str, strict: bool) -> None:
    with pytest.raises(ExportError) as caught:
        torch.export.export(wrapped(storage).train(), (X,), strict=strict)
    assert str(caught.value) == (
        "a wrapped layer cannot be exported to be trained: its gradient would be lost. Call model.eval() before "
        "torch.export.export, or call that under torch.no_grad()"
    )


Export = Callable[[nn.Module], Any]
OTHERS: dict[str, tuple[Export, str]] = {
    "trace": (lambda model: torch.jit.trace(model, (X,)), "traced by torch.jit"),
    "script": (torch.jit.script, "scripted by torch.jit"),
    "onnx": (lambda model: torch.onnx.export(model, (X,), os.devnull, dynamo=False), "exported to ONNX"),
}


@storages
@pytest.mark.filterwarnings("ignore")  # torch's own, that these exports are old
@pytest.mark.parametrize("kind", OTHERS)
def test_an_export_that_would_lose_the_gradient_is_refused_in_one_sentence(storage: str, kind: str) -> None:
    export, what = OTHERS[kind]
    with pytest.raises(ExportError) as caught:
        export(wrapped(storage))
    assert str(caught.value) == f"a wrapped layer cannot be {what}: {ADVICE}"


@storages
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_the_new_onnx_exporter_is_refused_too(storage: str, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # What torch.onnx.export(dynamo=True) does, without the packages it needs.
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(ExportError, match=re.escape(f"a wrapped layer cannot be exported to ONNX: {ADVICE}")):
        torch.export.export(wrapped(storage), (X,), strict=strict)


@pytest.mark.filterwarnings("ignore")
def test_in_full_precision_a_wrapped_model_can_be_traced() -> None:
    model = wrapped("master")
    with qsurgeon.disabled(model):
        traced: Any = torch.jit.trace(model, (X,))
        expected: Tensor = model(X)
    assert torch.equal(traced(X), expected)


@storages
def test_compiling_is_not_exporting(storage: str) -> None:
    model = wrapped(storage).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(X), model(X))
