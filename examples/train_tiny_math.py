"""Train the bundled demo model from scratch on the CPU and write it, with its tokenizer and a README.

    python examples/train_tiny_math.py

The task is in tiny_math.py. The same seed, step count and thread count give the same weights on the same
machine. The accuracy in the README is measured on the bf16 model as reloaded from the written folder.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tiny_math import Problem, accuracy, encode, make_problems, stream
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

OUTPUT = Path(__file__).resolve().parent / "models" / "tiny-math"
BATCH_SIZE = 64
MATRIX_RATE = 0.02  # Muon, for the matrices of the layers
LEARNING_RATE = 3e-3  # AdamW, for the embeddings and the norms
WEIGHT_DECAY = 0.01
BETAS = (0.9, 0.98)
MOMENTUM = 0.95
WARMUP_STEPS = 50
FLAT_SHARE = 0.3
CONTEXT = 256
EVALUATION_PROBLEMS = 512
EVALUATION_SEED = 1


def build_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE in Qwen2's own style: one token per digit and per word of the task.

    Loading a tokenizer for model type qwen2 rebuilds Qwen2Tokenizer's fixed pipeline around the saved
    vocabulary and merges, so only a tokenizer that is that pipeline to begin with comes back unchanged.
    """
    base = Qwen2Tokenizer(
        eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left", model_max_length=CONTEXT
    )
    texts = [problem.prompt + problem.completion for problem in make_problems(4000)]
    # The size is only a ceiling: training ends by itself once every word of the task is one token.
    trained: PreTrainedTokenizerBase = base.train_new_from_iterator(texts, vocab_size=512, show_progress=False)
    return trained


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """The untrained model, with every dimension a multiple of 32 so that any group size up to 32 divides it."""
    config = Qwen2Config(  # type: ignore[call-arg]  # which takes more than it declares
        vocab_size=math.ceil(len(tokenizer) / 32) * 32,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
    )
    return model


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, a flat stretch, then a cosine down to zero."""
    flat_until = FLAT_SHARE * steps
    if step < flat_until:
        return min(1.0, (step + 1) / WARMUP_STEPS)
    return 0.5 * (1 + math.cos(math.pi * (step - flat_until) / (steps - flat_until)))


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before they are applied (Jordan et al., 2024).

    torch.optim.Muon computes in bf16, one matrix after the other: on a CPU that takes longer than the rest of the
    step. Here all matrices of a shape go together, in FP32.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], rate: float) -> None:
        shapes = {one.shape for one in matrices}
        groups = [{"params": [one for one in matrices if one.shape == shape]} for shape in sorted(shapes)]
        super().__init__(groups, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            matrices = group["params"]
            grads = torch.stack([one.grad for one in matrices])
            momentum = group.setdefault("momentum", torch.zeros_like(grads)).lerp_(grads, 1 - MOMENTUM)
            rows, columns = matrices[0].shape
            update = orthogonal(grads.lerp(momentum, MOMENTUM)) * max(1, rows / columns) ** 0.5
            for matrix, change in zip(matrices, update, strict=True):
                matrix.mul_(1 - group["lr"] * WEIGHT_DECAY).sub_(change, alpha=group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrix of each (n, rows, columns)."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    upright: Tensor = x if matrices.shape == x.shape else x.mT
    return upright


def optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest: half the steps that AdamW alone needs."""
    matrices = [one for name, one in model.named_parameters() if one.ndim == 2 and ".layers." in name]
    rest = [one for name, one in model.named_parameters() if one.ndim != 2 or ".layers." not in name]
    adam = torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    return [Muon(matrices, MATRIX_RATE), adam]


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, steps: int, seed: int) -> float:
    """Train in place on fresh problems only, reporting on stderr; the last batch's loss."""
    both = optimizers(model)
    schedules = [LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps)) for optimizer in both]
    stepping: list[Any] = [*both, *schedules]
    problems = stream("train", seed)
    started, loss = time.perf_counter(), torch.tensor(math.nan)
    model.train()
    for step in range(1, steps + 1):
        batch = encode(tokenizer, [next(problems) for _ in range(BATCH_SIZE)])
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        for stepped in stepping:
            stepped.step()
        model.zero_grad()
        if step % 20 == 0 or step == steps:
            left = (time.perf_counter() - started) / step * (steps - step)
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {left:.0f} s left", file=sys.stderr)
    return loss.item()


def measure(folder: Path) -> float:
    """The accuracy on held-out problems of the model and tokenizer as anyone would load them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return accuracy(model, tokenizer, make_problems(EVALUATION_PROBLEMS, "heldout", EVALUATION_SEED))


def readme(model: Qwen2ForCausalLM, arguments: argparse.Namespace, loss: float, wall: float, share: float) -> str:
    """The README of the model folder."""
    config, right = model.config, round(share * EVALUATION_PROBLEMS)
    examples = "\n\n".join(_shown(problem) for problem in make_problems(2, "heldout", EVALUATION_SEED))
    return f"""# tiny-math

A small Qwen2 language model, trained from scratch on generated arithmetic word problems of two or three
steps (add, take away, double, triple; every value between 0 and 99). It writes out its working and then the
answer after a `#`. It is a demo model with a checkable answer: it can do this task and nothing else.

Two held-out problems, each with the completion it should write:

{examples}

A hash of the prompt decides whether a problem is held out, so no held-out problem was trained on. The
problems come from `examples/tiny_math.py`.

**Measured accuracy: {share:.2%}** ({right} of {EVALUATION_PROBLEMS} held-out problems), greedy decoding, exact
match of the final answer, on the CPU, with the bf16 weights as reloaded from this folder.

| | |
|---|---|
| Architecture | Qwen2: {config.num_hidden_layers} layers, hidden {config.hidden_size}, \
intermediate {config.intermediate_size}, {config.num_attention_heads} heads, \
{config.num_key_value_heads} key-value heads, head size {config.head_dim}, untied embeddings |
| Parameters | {model.num_parameters():,}, stored in bf16 |
| Tokenizer | byte-level BPE, {config.vocab_size} embedding rows, one token per digit and per word of the task |
| Training | {arguments.steps} steps of {BATCH_SIZE} fresh problems in fp32, loss on the completion only, \
seed {arguments.seed} |
| Optimizer | Muon for the layers' matrices, learning rate {MATRIX_RATE}; AdamW for the rest, learning rate \
{LEARNING_RATE}, betas {BETAS}; weight decay {WEIGHT_DECAY}, gradient norm clipped at 1; \
{WARMUP_STEPS} steps of warm-up, flat to {FLAT_SHARE:.0%} of the steps, then cosine |
| Last training loss | {loss:.4f} |
| Wall time | {wall:.0f} s of training on {arguments.threads} CPU threads, torch {torch.__version__} |

Make it again, from the repository root:

    python examples/train_tiny_math.py --steps {arguments.steps} --seed {arguments.seed} --threads {arguments.threads}
"""


def _shown(problem: Problem) -> str:
    """A problem as an indented Markdown block."""
    return "".join(f"    {line}\n" for line in (problem.prompt + problem.completion).splitlines()).rstrip()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the tiny-math demo model on the CPU.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=640, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Train, write, reload, measure, and write the README."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    started = time.perf_counter()
    loss = train(model, tokenizer, arguments.steps, arguments.seed)
    wall = time.perf_counter() - started
    model.bfloat16().save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    share = measure(arguments.output)
    (arguments.output / "README.md").write_text(readme(model, arguments, loss, wall, share), encoding="utf-8")
    print(f"accuracy {share:.2%} after {wall:.0f} s; written to {arguments.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
