"""A scan with data: real inputs, outputs, and what the whole model says."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qsurgeon
from qsurgeon.checkpoint import Events
from qsurgeon.errors import CalibrationError, CallError, QSurgeonError
from qsurgeon.scanning import ALONE, WITHOUT, measure
from qsurgeon.scanning.data import Batch, from_rows, from_text, given
from qsurgeon.scanning.effects import compared

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples/models/tiny-math"


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch operations round, to the same bits: to compile a kernel for each format takes longer than the rest."""
    monkeypatch.setenv("QSURGEON_KERNELS", "eager")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(TINY)


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in (7, 12):
        ids = torch.randint(0, 96, (2, length), generator=generator)
        made.append({"input_ids": ids, "labels": ids})
    return made


def kl(p: Tensor, q: Tensor) -> float:
    """Return the mean of KL(p‖q) over places, in float64."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def wrapped(small_model: Callable[..., Any], modules: list[str]) -> Any:
    rule = {"target": modules, "weight": "mxfp4", "input": "mxfp4"}
    return qsurgeon.apply(qsurgeon.Recipe(version=1, rules=[rule]), small_model())


def test_an_effect_is_that_of_a_model_in_which_this_module_alone_is_wrapped(small_model: Callable[..., Any]) -> None:
    found = qsurgeon.scan("w4a4-mxfp4", small_model(), data=batches()[:1]).scan
    (batch,) = batches()[:1]
    row = next(one for one in found.rows if one.module == "model.layers.1.mlp.up_proj")
    others = [one.module for one in found.rows if one is not row]
    with torch.no_grad():
        plain = small_model()(batch["input_ids"]).logits[:, :-1]
        alone = wrapped(small_model, [row.module])(batch["input_ids"]).logits[:, :-1]
        without = wrapped(small_model, others)(batch["input_ids"]).logits[:, :-1]
        every = wrapped(small_model, [*others, row.module])(batch["input_ids"]).logits[:, :-1]
    assert row.effects[ALONE].mean_distance == pytest.approx(kl(plain, alone), rel=0.02)
    assert row.effects[WITHOUT].mean_distance == pytest.approx(kl(plain, without), rel=0.02)
    assert found.every["recipe"].mean_distance == pytest.approx(kl(plain, every), rel=0.02)
    loss = nn.functional.cross_entropy(every.flatten(0, 1), batch["input_ids"][:, 1:].flatten()).item()
    assert found.every["recipe"].mean_loss == pytest.approx(loss, rel=1e-4)
    expected = nn.functional.cross_entropy(plain.flatten(0, 1), batch["input_ids"][:, 1:].flatten()).item()
    assert found.plain is not None
    assert found.plain.mean_loss == pytest.approx(expected, rel=1e-4)
    assert found.plain.distance == 0


def test_inputs_and_outputs_are_those_of_the_layer(small_model: Callable[..., Any]) -> None:
    found, model = qsurgeon.scan("w4a4-mxfp4", small_model(), data=batches()).scan, small_model()
    name = "model.layers.0.mlp.down_proj"
    inputs: list[Tensor] = []
    layer = model.get_submodule(name)
    layer.register_forward_hook(lambda _, args, __: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches():
            model(batch["input_ids"])
    x, w, grid = torch.cat(inputs), layer.weight.detach(), qsurgeon.get_format("mxfp4")
    row = next(one for one in found.rows if one.module == name)
    assert row.input is not None
    assert row.input.zeroed == measure(x, grid.as_input).zeroed
    assert row.input.sqnr == pytest.approx(measure(x, grid.as_input).sqnr, abs=1e-3)
    y, qx, qw = x @ w.T, grid.fake_quantize(x), grid.fake_quantize(w)
    noise = {"weight": x @ qw.T, "input": qx @ w.T, "both": qx @ qw.T}
    assert row.output is not None
    for operand, rounded in noise.items():
        expected = 10 * torch.log10(y.square().sum() / (rounded - y).square().sum()).item()
        assert row.output.sqnr(operand) == pytest.approx(expected, abs=0.01)


def test_a_scan_leaves_the_model_as_it_was(small_model: Callable[..., Any]) -> None:
    model = small_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    qsurgeon.scan("w4a4-mxfp4", model, data=batches()[:1], srdd=True)
    assert [type(module) for module in model.modules()] == kinds
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_logits_is_compared_by_its_last_hidden_state(small_model: Callable[..., Any]) -> None:
    found = qsurgeon.scan("w4a4-mxfp4", small_model().model, data=batches()[:1]).scan
    assert found.data is not None
    assert found.data.distance == "relative_l2"
    assert 0 < found.every["recipe"].mean_distance < 1
    assert found.every["recipe"].mean_loss is None


def test_rows_that_are_no_target_do_not_count() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    labels = torch.tensor([[-100, -100, 3, -100, 4]])
    effect = compared(p, q, "kl", Batch({"input_ids": labels}, labels), shifts=True)
    assert (effect.places, effect.targets) == (2, 2)
    assert effect.mean_distance == pytest.approx(kl(p[0, [1, 3]], q[0, [1, 3]]), rel=1e-4)


def test_modules_that_the_data_never_reaches_are_told(small_model: Callable[..., Any]) -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.unused = small_model(), nn.Linear(32, 32)
            self.config = self.inner.config

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    heard = Heard()
    recipe = qsurgeon.Recipe(version=1, rules=[{"target": ["q_proj", "unused"], "weight": "mxfp4"}])
    found = qsurgeon.scan(recipe, Deaf(), data=batches()[:1], events=heard).scan
    assert heard.notes == ["1 modules are not called on this data, such as unused"]
    row = found.rows[-1]
    assert (row.output, row.input, row.effects[ALONE].distance) == (None, None, 0.0)


class Heard(Events):
    def __init__(self, after: int = 10**9) -> None:
        self.left, self.notes, self.total, self.done = after, list[str](), 0, 0

    def begin(self, estimate: Any) -> None:
        self.total = estimate.read

    def advance(self, count: int) -> None:
        self.left, self.done = self.left - 1, self.done + count
        if self.left < 0:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("after", [3, 8, 20, 31])
def test_an_interrupted_scan_with_data_goes_on_to_the_same_bytes(
    after: int, small_model: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = qsurgeon.Recipe(version=1, rules=[{"target": ["mlp"], "weight": "mxfp4", "input": "mxfp4"}])
    options: Mapping[str, Any] = {"data": batches(), "srdd": True, "workers": 1}
    whole, output, heard = tmp_path / "whole.json", tmp_path / "scan.json", Heard()
    qsurgeon.scan(recipe, small_model(), output=whole, events=heard, **options)
    assert heard.done == heard.total
    with pytest.raises(KeyboardInterrupt):
        qsurgeon.scan(recipe, small_model(), output=output, events=Heard(after), **options)
    qsurgeon.scan(recipe, small_model(), output=output, events=Heard(), **options)
    assert output.read_bytes() == whole.read_bytes()


# --- data


def rows(tmp_path: Path, *lines: Any) -> Path:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), "utf-8")
    return file


def test_rows_of_a_file_are_batched_by_their_length(tmp_path: Path, tokenizer: Any) -> None:
    file = rows(tmp_path, {"text": "Ava has 2"}, {"text": "Ben has 34"}, {"text": "Cleo has"}, {"input_ids": [1, 2, 3]})
    found = from_rows(file, tokenizer, 10, 512, 384)
    shapes = sorted(tuple(batch.inputs["input_ids"].shape) for batch in found.batches)
    assert sum(shape[0] for shape in shapes) == found.samples == 4
    assert all(batch.inputs["attention_mask"].all() for batch in found.batches)
    assert from_rows(file, tokenizer, 2, 512, 384).samples == 2
    cut = from_rows(file, tokenizer, 10, 3, 384)
    assert cut.cut >= 1
    assert {batch.inputs["input_ids"].shape[1] for batch in cut.batches} <= {2, 3}


def test_of_a_prompt_and_its_completion_the_completion_counts(tmp_path: Path, tokenizer: Any) -> None:
    (batch,) = from_rows(rows(tmp_path, {"prompt": "Ava has 2", "completion": "2+3=5"}), tokenizer, 1, 512, 384).batches
    assert batch.labels is not None
    ids, labels = batch.inputs["input_ids"][0].tolist(), batch.labels[0].tolist()
    completion = [*tokenizer("2+3=5").input_ids, tokenizer.eos_token_id]
    assert ids == [*tokenizer("Ava has 2").input_ids, *completion]
    assert labels == [-100] * (len(ids) - len(completion)) + completion


def test_text_is_cut_into_windows(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "text.txt").write_text("Ava has 2 apples. " * 20, "utf-8")
    found = from_text(tmp_path / "text.txt", tokenizer, 3, 16, 384)
    assert [tuple(batch.inputs["input_ids"].shape) for batch in found.batches] == [(3, 16)]


WRONG = [
    ('{"text": ', "is no JSON: Expecting value: line 1 column 10 (char 9)"),
    ("[1]\n", "expects an object, got list"),
    ('{"question": "a", "answer": "b"}\n', "has 'question', 'answer'; expected one of: text, prompt and completion, "
     "messages, input_ids"),
    ('{"input_ids": [1.5, 2]}\n', "expected two tokens or more, whole numbers, and a label for each"),
    ('{"input_ids": [1, 2], "labels": [1]}\n', "expected two tokens or more, whole numbers, and a label for each"),
    ('{"messages": [{"role": "user", "content": "a"}]}\n', "has messages, and the tokenizer has no chat template; say "
     "text instead"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_a_row_that_cannot_be_used_is_named(line: str, message: str, tmp_path: Path, tokenizer: Any) -> None:
    file = rows(tmp_path, {"text": "Ava has 2"}, line)
    with pytest.raises(CalibrationError) as caught:
        from_rows(file, tokenizer, 10, 512, 384)
    assert str(caught.value) == f"{file}:2: {message}"


def refused(kind: type[QSurgeonError], act: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        act()
    return str(caught.value)


def test_what_is_no_data_is_refused(tmp_path: Path, tokenizer: Any, small_model: Callable[..., Any]) -> None:
    file, model = rows(tmp_path), small_model()
    assert refused(CalibrationError, lambda: from_rows(file, tokenizer, 1, 9, 9)) == f"{file}: has no rows"
    assert refused(CalibrationError, lambda: from_text(file, tokenizer, 1, 9, 9)) == f"{file}: has no text to scan with"
    file.write_bytes(b"abc\xff")
    assert refused(CalibrationError, lambda: from_text(file, tokenizer, 1, 9, 9)) == (
        f"{file}: is no text in UTF-8: invalid start byte at byte 3"
    )
    assert refused(CalibrationError, lambda: given([])) == "there is no batch to scan with"
    assert refused(CalibrationError, lambda: qsurgeon.scan("w4a4-mxfp4", TINY, data=tmp_path / "no.jsonl")) == (
        f"{tmp_path}/no.jsonl: cannot be read: No such file or directory"
    )
    assert refused(CallError, lambda: qsurgeon.scan("w4a4-mxfp4", model, data=file)) == (
        "qsurgeon.scan: a live model does not say what its tokenizer is; pass tokenizer="
    )
    assert refused(CallError, lambda: qsurgeon.scan("w4a4-mxfp4", model, data=file, text=file)) == (
        "qsurgeon.scan: data and text are both given; give one of them"
    )
    assert refused(CallError, lambda: qsurgeon.scan("w4a4-mxfp4", model, srdd=True)) == (
        "qsurgeon.scan: SRDD looks at what layers return: give it data or text"
    )


def test_an_encoder_and_decoder_needs_batches(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=96, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    assert refused(CalibrationError, lambda: qsurgeon.scan("w4a4-mxfp4", model, text=rows(tmp_path))) == (
        "T5ForConditionalGeneration is an encoder and a decoder, which a file of text does not tell apart: give "
        "batches in Python, qsurgeon.scan(recipe, model, data=batches)"
    )
    ids = torch.arange(8).reshape(1, 8)
    batch = {"input_ids": ids, "decoder_input_ids": ids, "labels": ids}
    found = qsurgeon.scan("w4a4-mxfp4", model, data=[batch]).scan
    assert found.plain is not None
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model.eval()(**batch).logits[0], ids[0]).item()
    assert found.plain.mean_loss == pytest.approx(loss, rel=1e-4)


def test_a_model_that_says_nothing_is_refused(small_model: Callable[..., Any]) -> None:
    class Mute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.proj(x)
            return out

    recipe = qsurgeon.Recipe(version=1, rules=[{"target": ["proj"], "weight": "mxfp4"}])
    assert refused(CalibrationError, lambda: qsurgeon.scan(recipe, Mute(), data=[{"x": torch.randn(2, 32)}])) == (
        "Mute returns neither logits nor a last hidden state: what rounding does to it is not known"
    )
