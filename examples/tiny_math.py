"""The task of the bundled demo model: multi-step arithmetic word problems with checkable answers.

A problem is a short story of two or three steps (add, take away, double, triple) in which every value
stays between 0 and 99. The completion works through the steps and ends with the answer::

    Ava has 25 apples. They double. Ava loses 7. How many now?
    25*2=50;50-7=43;#43

Training and held-out problems never overlap: a hash of the prompt decides which split a problem is in.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

Split = Literal["train", "heldout"]

MAX_VALUE = 99
MAX_NEW_TOKENS = 40  # room to spare: the longest completion has 30 characters, and then the end token
IGNORED_LABEL = -100  # the label transformers' losses skip

NAMES = ("Ava", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gia", "Hugo")
ITEMS = ("apples", "books", "cards", "coins", "pens", "shells", "stamps", "stones")
GAINS = ("finds", "buys", "gets")
LOSSES = ("loses", "sells", "drops")
MULTIPLES = {2: "double", 3: "triple"}


@dataclass(frozen=True)
class Problem:
    """One word problem: the text the model reads, the text it should write, and the answer in it."""

    prompt: str
    completion: str
    answer: int


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to; one in eight is held out, whatever the seed it was drawn with."""
    return "heldout" if hashlib.sha256(prompt.encode()).digest()[0] % 8 == 0 else "train"


def _step(rng: random.Random, name: str, value: int) -> tuple[str, str, int]:
    """One step from `value`: its sentence, its line of working and the new value."""
    kinds = (["+"] if value < MAX_VALUE else []) + (["-"] if value > 0 else [])
    kinds += ["*"] if 0 < value <= MAX_VALUE // 2 else []
    kind = rng.choice(kinds)
    if kind == "+":
        amount = rng.randint(1, MAX_VALUE - value)
        sentence, result = f" {name} {rng.choice(GAINS)} {amount}.", value + amount
    elif kind == "-":
        amount = rng.randint(1, value)
        sentence, result = f" {name} {rng.choice(LOSSES)} {amount}.", value - amount
    else:
        amount = rng.choice([factor for factor in MULTIPLES if value * factor <= MAX_VALUE])
        sentence, result = f" They {MULTIPLES[amount]}.", value * amount
    return sentence, f"{value}{kind}{amount}={result};", result


def _draw(rng: random.Random) -> Problem:
    """One problem of either split."""
    name, value = rng.choice(NAMES), rng.randint(2, MAX_VALUE)
    prompt, completion = f"{name} has {value} {rng.choice(ITEMS)}.", ""
    for _ in range(rng.choice((2, 3))):
        sentence, working, value = _step(rng, name, value)
        prompt, completion = prompt + sentence, completion + working
    return Problem(prompt + " How many now?\n", f"{completion}#{value}", value)


def stream(split: Split, seed: int) -> Iterator[Problem]:
    """An endless stream of the split's problems; the same seed gives the same stream."""
    rng = random.Random(seed)
    while True:
        problem = _draw(rng)
        if split_of(problem.prompt) == split:
            yield problem


def make_problems(count: int, split: Split = "train", seed: int = 0) -> list[Problem]:
    """The first `count` problems of the split's stream."""
    return list(itertools.islice(stream(split, seed), count))


def encode(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> dict[str, Tensor]:
    """A training batch, `input_ids` and `labels`, whose loss covers the completion and the end token only.

    Rows are padded on the right, where causal attention never looks, so no attention mask is needed.
    """
    prompts = tokenizer([problem.prompt for problem in problems]).input_ids
    completions = tokenizer([problem.completion for problem in problems]).input_ids
    rows = [p + c + [tokenizer.eos_token_id] for p, c in zip(prompts, completions, strict=True)]
    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), IGNORED_LABEL)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        input_ids[index, : len(row)] = torch.tensor(row)
        labels[index, len(prompt) : len(row)] = input_ids[index, len(prompt) : len(row)]
    return {"input_ids": input_ids, "labels": labels}


def _unwrap(model: Any) -> Any:
    """The model inside data-parallel and compile wrappers, which do not pass on `generate`."""
    while hasattr(model, "_orig_mod") or not hasattr(model, "generate"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def answer_in(text: str) -> str:
    """What a completion gives as its answer: everything after the last `#`, or nothing without one."""
    return text.rpartition("#")[2].strip() if "#" in text else ""


@torch.no_grad()
def accuracy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], batch_size: int = 128
) -> float:
    """The share of problems whose greedily generated completion ends in exactly the right answer.

    Every submodule's train or eval mode is put back afterwards.
    """
    inner, right = _unwrap(model), 0
    device = next(inner.parameters()).device
    modes = [(module, module.training) for module in inner.modules()]
    inner.eval()
    try:
        for start in range(0, len(problems), batch_size):
            batch = problems[start : start + batch_size]
            prompts = [problem.prompt for problem in batch]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(device)
            output = inner.generate(
                **inputs, do_sample=False, num_beams=1, max_new_tokens=MAX_NEW_TOKENS,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            written = output[:, inputs["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            right += sum(answer_in(t) == str(p.answer) for t, p in zip(texts, batch, strict=True))
    finally:
        for module, training in modes:
            module.training = training
    return right / len(problems)
