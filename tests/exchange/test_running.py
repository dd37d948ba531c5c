"""transformers, with compressed-tensors in it, runs what is exported, and gives the outputs of the wrapped model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import qsurgeon

IDS = torch.arange(1, 9)[None]


@pytest.mark.parametrize(
    ("weight", "asked"),
    [
        ("mxfp4", None),
        ("even", "even"),
        ("nvfp4", None),
        ("mxfp8", None),
        ("int4_b32", None),
    ],
)
def test_transformers_gives_the_outputs_of_the_wrapped_model(
    wrapped: Callable[..., Path], tmp_path: Path, weight: str, asked: str | None
) -> None:
    folder = wrapped(weight, asked)
    done = qsurgeon.export(folder, tmp_path / "out", "compressed-tensors", "transformers")
    assert [one.same for one in done.computed] == [True]
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = qsurgeon.load(folder)(input_ids=IDS).logits
    assert torch.equal(served(input_ids=IDS).logits, ours)


def test_another_rule_gives_other_outputs_and_the_report_says_so(wrapped: Callable[..., Path], tmp_path: Path) -> None:
    folder = wrapped("mxfp4", "mxfp4")
    done = qsurgeon.export(folder, tmp_path / "out", "compressed-tensors", "transformers")
    assert [(one.trained, one.computes, one.same) for one in done.computed] == [
        ("mxfp4, rule floor", "mxfp4, rule even", False)
    ]
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(served(input_ids=IDS).logits, qsurgeon.load(folder)(input_ids=IDS).logits)
