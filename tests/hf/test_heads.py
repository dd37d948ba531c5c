"""A wrapped output head, and libraries that multiply with its weight themselves."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers as hf
from transformers.integrations import liger
from versions import recomputing

import qsurgeon
from qsurgeon.errors import SurgeryError
from qsurgeon.recipe import Recipe

trainer = pytest.importorskip("trl.trainer")
utils = pytest.importorskip("trl.trainer.utils")
sft_trainer = pytest.importorskip("trl.trainer.sft_trainer")

Maker = Callable[..., Any]
TOKENIZER = Path(__file__).parent.parent.parent / "examples" / "models" / "tiny-math"


def wrapped(model: Any, storage: str = "master", target: str = "lm_head", **rule: Any) -> Any:
    rules = [{"target": [target], "weight": "mxfp8", "input": "mxfp8", **rule}]
    return qsurgeon.apply(Recipe.model_validate({"version": 1, "storage": storage, "rules": rules}), model)


@pytest.fixture
def model(make_qwen2: Maker) -> Any:
    return make_qwen2(num_hidden_layers=1, tie_word_embeddings=False)


def fuse(model: Any) -> None:
    """Give a model the head of TRL that is never called, as its trainers do."""
    if hasattr(utils, "add_fused_lm_head"):
        utils.add_fused_lm_head(model)
    elif hasattr(utils, "patch_chunked_lm_head"):
        utils.patch_chunked_lm_head(model, 256, 1.0)
    else:
        pytest.skip(f"TRL {version('trl')} has no such head; 1.0 is the first that has")


def fuse_for_sft(model: Any) -> None:
    if not hasattr(sft_trainer, "_patch_chunked_ce_lm_head"):
        pytest.skip(f"SFTTrainer of TRL {version('trl')} has no such head of its own; 1.2 to 1.14 have")
    sft_trainer._patch_chunked_ce_lm_head(model, 256)


DOORS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "TRL": (fuse, "the fused head of TRL's trainers"),
    "SFT": (fuse_for_sft, "the fused head of TRL's trainers"),
    "Liger": (lambda model: liger.apply_liger_kernel(model, None), "Liger's fused_linear_cross_entropy"),
}
WOULD = {"master": "train it in full precision", "packed": "take its packed codes for values"}


@pytest.mark.parametrize("storage", WOULD)
@pytest.mark.parametrize("door", DOORS)
def test_a_fused_loss_is_refused_a_wrapped_head(model: Any, door: str, storage: str) -> None:
    add, who = DOORS[door]
    forward = type(wrapped(model, storage)).forward
    with pytest.raises(SurgeryError) as caught:
        add(model)
    assert str(caught.value) == (
        f"lm_head, the output head of Qwen2ForCausalLM, is wrapped, and {who} multiplies with its weight itself and "
        f"never calls it: it would {WOULD[storage]}. Exclude the head in the recipe: 'exclude: [lm_head]'"
    )
    assert "forward" not in vars(model)
    assert type(model).forward is forward


def test_so_is_one_below_an_adapter(model: Any) -> None:
    adapted = peft.get_peft_model(wrapped(model), peft.LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(SurgeryError, match=r"^lm_head, the output head of Qwen2ForCausalLM, is wrapped"):
        fuse(adapted.get_base_model())


def test_what_is_not_computed_past_goes_on(make_qwen2: Maker) -> None:
    changes: tuple[Callable[[Any], Any], ...] = (
        lambda model: wrapped(model, target="layers"),
        lambda model: wrapped(model, phases="rollout"),  # training is in full precision anyhow
        lambda model: model,
    )
    for change in changes:
        model = change(make_qwen2(num_hidden_layers=1, tie_word_embeddings=False))
        fuse(model)
        assert "forward" in vars(model)


@pytest.mark.parametrize("order", ["qsurgeon, used", "used, qsurgeon"])
def test_every_trainer_of_trl_uses_the_function_that_refuses_whichever_is_imported_first(order: str) -> None:
    names = "DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer"
    code = """
import sys
{}
functions = "add_fused_lm_head", "patch_chunked_lm_head", "_patch_chunked_ce_lm_head", "apply_liger_kernel"
users = [module for name, module in sys.modules.items() if name.startswith(("trl.trainer.", "transformers.trainer"))]
found = [vars(module)[name] for module in users for name in functions if name in vars(module)]
print(len(found), all("patched_by_qsurgeon" in vars(one) for one in found))
""".format(
        "\n".join({"qsurgeon": "import qsurgeon", "used": f"from trl import {names}"}[one] for one in order.split(", "))
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    count, refuse = done.stdout.split()[-2:]
    assert int(count) >= 1  # transformers' Trainer, at least
    assert refuse == "True"


@pytest.mark.parametrize("whose", ["model", "teacher_model"])
def test_a_distillation_that_multiplies_with_the_head_itself_is_refused(
    whose: str, make_qwen2: Maker, tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl.trainer.distillation_trainer", reason="a TRL without DistillationTrainer")
    datasets = pytest.importorskip("datasets")
    models = {
        name: make_qwen2(vocab_size=384, num_hidden_layers=1, tie_word_embeddings=False)
        for name in ("model", "teacher_model")
    }
    wrapped(models[whose])

    def trainer() -> Any:
        return trl.DistillationTrainer(
            **models,
            args=trl.DistillationConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], **recomputing(False)),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["1 + 1 ="] * 4}),
            processing_class=hf.AutoTokenizer.from_pretrained(TOKENIZER),
        )

    with pytest.raises(SurgeryError) as caught:
        trainer()
    assert str(caught.value) == (
        "lm_head, the output head of Qwen2ForCausalLM, is wrapped, and the loss of TRL's DistillationTrainer "
        "multiplies with its weight itself and never calls it: it would train it in full precision. Exclude the head "
        "in the recipe: 'exclude: [lm_head]'"
    )
    models[whose] = make_qwen2(vocab_size=384, num_hidden_layers=1, tie_word_embeddings=False)
    assert trainer().model is models["model"]


@pytest.mark.parametrize("phases", ["both", "rollout"])
def test_a_head_that_gets_another_forward_is_refused_in_each_phase(model: Any, phases: str) -> None:
    if "cast_lm_head_to_fp32" not in inspect.signature(getattr(utils, "add_fused_lm_head", len)).parameters:
        pytest.skip(f"TRL {version('trl')} casts no head")
    with pytest.raises(SurgeryError, match=r"^lm_head, the output head of Qwen2ForCausalLM, is wrapped"):
        utils.add_fused_lm_head(wrapped(model, phases=phases), cast_lm_head_to_fp32=True)
