"""A wrapped output head, and libraries that multiply with its weight themselves."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
from transformers.integrations import liger

import qsurgeon
from qsurgeon.errors import SurgeryError
from qsurgeon.recipe import Recipe

trainer = pytest.importorskip("trl.trainer")

Maker = Callable[..., Any]


def wrapped(model: Any, storage: str = "master", target: str = "lm_head", **rule: Any) -> Any:
    rules = [{"target": [target], "weight": "mxfp8", "input": "mxfp8", **rule}]
    return qsurgeon.apply(Recipe.model_validate({"version": 1, "storage": storage, "rules": rules}), model)


@pytest.fixture
def model(make_qwen2: Maker) -> Any:
    return make_qwen2(num_hidden_layers=1, tie_word_embeddings=False)


DOORS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "TRL": (trainer.add_fused_lm_head, "the fused head of TRL's trainers"),
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
        trainer.add_fused_lm_head(adapted.get_base_model())


def test_what_is_not_computed_past_goes_on(make_qwen2: Maker) -> None:
    changes: tuple[Callable[[Any], Any], ...] = (
        lambda model: wrapped(model, target="layers"),
        lambda model: wrapped(model, phases="rollout"),  # training is in full precision anyhow
        lambda model: model,
    )
    for change in changes:
        model = change(make_qwen2(num_hidden_layers=1, tie_word_embeddings=False))
        trainer.add_fused_lm_head(model)
        assert "forward" in vars(model)


def test_every_trainer_of_trl_uses_the_function_that_refuses() -> None:
    names = ("DPOTrainer", "GRPOTrainer", "KTOTrainer", "RLOOTrainer", "SFTTrainer")
    for name in names:
        module = __import__(getattr(trainer, name).__module__, fromlist=[name])
        assert module.add_fused_lm_head is trainer.add_fused_lm_head
        assert vars(module.add_fused_lm_head)["patched_by_qsurgeon"]
