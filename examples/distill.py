"""Quantization-aware distillation: the teacher is the same model in full precision, so that no second one is held.

python examples/distill.py --steps 20 --output out/distilled
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_math import IGNORED_LABEL, encode, make_problems
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import qsurgeon

TINY_MATH = Path(__file__).parent / "models" / "tiny-math"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="w4a4-mxfp4", help="shipped name, or path")
    parser.add_argument("--model", default=str(TINY_MATH))
    parser.add_argument("--output", required=True, help="folder for the distilled model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    return parser.parse_args(argv)


def distance(student: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return KL(teacher ‖ student), the mean of answer tokens in nats; the teacher is the model as it is now."""
    ids, answers = batch["input_ids"], batch["labels"][:, 1:] != IGNORED_LABEL
    with qsurgeon.disabled(student), torch.no_grad():
        teacher = student(ids).logits[:, :-1][answers].log_softmax(-1)
    own = student(ids).logits[:, :-1][answers].log_softmax(-1)
    return nn.functional.kl_div(own, teacher, log_target=True, reduction="batchmean")


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Distill and save; return the divergence at each step."""
    args = parse(argv)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = qsurgeon.apply(args.recipe, AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    problems = make_problems(args.steps * args.batch_size)
    found = []
    for step in range(args.steps):
        batch = encode(tokenizer, problems[step * args.batch_size : (step + 1) * args.batch_size])
        loss = distance(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
        print(f"step {step + 1:4d}  divergence from full precision {found[-1]:.4f} nats a token")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    return found


if __name__ == "__main__":
    main()
