"""Train the bundled model under a recipe with accelerate, in one process or several.

    python examples/train_accelerate.py --steps 60 --output out/trained
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/train_accelerate.py --output out/trained
    python examples/train_accelerate.py --steps 80 --output out/trained --resume

The last one goes on where the output folder stopped, to the bit as if it had never stopped. The other configs,
for FSDP2 and DeepSpeed, are beside ddp.yaml.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tiny_math import encode, make_problems
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import qsurgeon

TINY_MATH = Path(__file__).parent / "models" / "tiny-math"


class Progress:
    """The steps done, kept with the state that accelerate saves."""

    done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="w4a4-mxfp4", help="shipped name, or path")
    parser.add_argument("--model", default=str(TINY_MATH))
    parser.add_argument("--output", required=True, help="folder for the trained model and the state to resume from")
    parser.add_argument("--resume", action="store_true", help="go on from --output")
    parser.add_argument("--steps", type=int, default=60, help="steps in all, those before a resume included")
    parser.add_argument("--batch-size", type=int, default=32, help="of one process")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def train(args: argparse.Namespace) -> list[float]:
    """Train to ``args.steps`` and save; return the loss of each step taken, averaged over the processes."""
    accelerator = Accelerator()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.resume:
        model = qsurgeon.load(args.output, dtype=torch.float32)
    else:
        model = qsurgeon.apply(args.recipe, AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32))
    accelerator.print(f"training with: {qsurgeon.inspect(model).summary}")

    problems: Any = make_problems(args.steps * args.batch_size * accelerator.num_processes, seed=args.seed)
    batches = DataLoader(problems, args.batch_size, collate_fn=functools.partial(encode, tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    model.train()
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if args.resume:
        accelerator.load_state(f"{args.output}/state")

    losses = []
    for batch in accelerator.skip_first_batches(batches, progress.done):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
        step = progress.done = progress.done + 1
        if step % 10 == 0 or step in (1, args.steps):
            accelerator.print(f"step {step:4d}  loss {losses[-1]:.4f}")

    accelerator.save_state(f"{args.output}/state")
    # Under FSDP each process holds a part of each tensor: all of them gather, the first one writes.
    whole = accelerator.get_state_dict(model)
    kept = accelerator.unwrap_model(model)
    kept.save_pretrained(args.output, state_dict=whole, is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output)
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    train(parse(None))
