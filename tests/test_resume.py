"""A LoRA adapter on a wrapped base whose training is cut and goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import qsurgeon


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        tokens = torch.randint(0, 96, (2, 8), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["fp32", "bf16"])
def test_resumed_training_is_uninterrupted_training_to_the_bit(
    make_qwen2: Callable[..., Any], tmp_path: Path, autocast: bool, fields: dict[str, Any]
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = make_qwen2(num_hidden_layers=1, tie_word_embeddings=False)
    qsurgeon.apply("w4a4-mxfp4", model.bfloat16()).save_pretrained(base)

    def fresh() -> Any:
        torch.manual_seed(5)
        config = peft.LoraConfig(r=4, target_modules="all-linear", lora_alpha=8, **fields)
        return peft.get_peft_model(qsurgeon.load(base, dtype="auto"), config, autocast_adapter_dtype=autocast).train()

    whole = fresh()
    expected = train(whole, adam(whole), range(6))
    assert expected[0] != expected[-1]
    first = fresh()
    optimizer = adam(first)
    losses = train(first, optimizer, range(3))
    first.save_pretrained(adapter)
    again = peft.PeftModel.from_pretrained(
        qsurgeon.load(base, dtype="auto"), adapter, is_trainable=True, autocast_adapter_dtype=autocast
    ).train()
    resumed = adam(again)
    resumed.load_state_dict(optimizer.state_dict())
    losses += train(again, resumed, range(3, 6))
    assert losses == expected
    ends = [dict(one.named_parameters()) for one in (whole, again)]
    assert [name for name, one in ends[0].items() if not torch.equal(one, ends[1][name])] == []
