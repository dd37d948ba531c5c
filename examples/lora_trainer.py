"""Train a LoRA adapter with transformers' Trainer on a model that computes in 4 bits.

    python examples/lora_trainer.py --steps 60 --output out/lora

The base is rewritten into a folder first and the adapter trained on that: an adapter names its base and carries no
recipe, so that whoever loads it gets the wrapped base. The adapter itself stays in full precision.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny_math import accuracy, encode, make_problems
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

import qsurgeon

TINY_MATH = Path(__file__).parent / "models" / "tiny-math"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="w4a4-mxfp4", help="shipped name, or path")
    parser.add_argument("--model", default=str(TINY_MATH))
    parser.add_argument("--output", type=Path, required=True, help="folder for the wrapped base and the adapter")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--problems", type=int, default=256, help="held-out problems that are scored")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


class Progress(TrainerCallback):
    """A line for each entry of the log, in place of all that the trainer knows."""

    def on_log(
        self, args: object, state: TrainerState, control: object, logs: dict[str, float] | None = None, **_: object
    ) -> None:
        if logs is not None and "loss" in logs:
            print(f"step {state.global_step:4d}  loss {logs['loss']:.4f}", flush=True)


def train(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    output = args.output.resolve()  # the adapter keeps its base's path
    base, adapter = output / "base", output / "adapter"
    qsurgeon.rewrite(args.recipe, args.model, base)
    model = qsurgeon.load(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    heldout = make_problems(args.problems, "heldout")
    print(f"training with: {qsurgeon.inspect(model).summary}")
    print(f"before  {accuracy(model, tokenizer, heldout):6.1%} of {len(heldout)} held-out problems", flush=True)

    lora = LoraConfig(r=32, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        output_dir=str(output / "trainer"), per_device_train_batch_size=args.batch_size, max_steps=args.steps,
        learning_rate=args.lr, seed=args.seed, use_cpu=not torch.cuda.is_available(), logging_steps=10,
        logging_first_step=True, remove_unused_columns=False, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        get_peft_model(model, lora),
        arguments,
        data_collator=functools.partial(encode, tokenizer),
        train_dataset=make_problems(args.steps * args.batch_size, seed=args.seed),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress())
    trainer.train()
    trainer.save_model(str(adapter))
    trained = qsurgeon.load(adapter, dtype=torch.float32)
    print(
        f"after   {accuracy(trained, tokenizer, heldout):6.1%} of the same, with: {qsurgeon.inspect(trained).summary}"
    )


if __name__ == "__main__":
    train(parse(None))
