"""DAPO with TRL on a model that computes in 4 bits: LoRA, W4A4, and the exact answer as the only reward.

    python examples/dapo_trl.py --steps 20 --output out/dapo

The seed experiment in miniature (see recipes/e13), on the bundled model. Rollouts and training both compute in the
recipe's formats. The adapter is trained on a folder that is wrapped, so that whoever loads it gets that base; the
score afterwards is that of the adapter as it was saved and loaded again. The bundled model solves nine problems of ten
before any training, and most groups of its answers are all right or all wrong and teach nothing: a few steps move the
score by less than the draw of the problems does.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_math import MAX_NEW_TOKENS, accuracy, answer_in, make_problems
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback, TrainerState, set_seed
from trl import GRPOConfig, GRPOTrainer

import qsurgeon

# What transformers calls recomputing in backward: the second until 5.22.
RECOMPUTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in GRPOConfig.__dataclass_fields__
)
NOT_RECOMPUTING: dict[str, Any] = {RECOMPUTING: False}
TINY_MATH = Path(__file__).parent / "models" / "tiny-math"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="w4a4-mxfp4", help="shipped name, or path")
    parser.add_argument("--model", default=str(TINY_MATH))
    parser.add_argument("--output", type=Path, required=True, help="folder for the wrapped base and the adapter")
    parser.add_argument("--steps", type=int, default=10, help="updates, each on rollouts of its own")
    parser.add_argument("--prompts", type=int, default=16, help="of one update")
    parser.add_argument("--samples", type=int, default=8, help="of one prompt")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--problems", type=int, default=256, help="held-out problems that are scored")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def exact(completions: list[str], answer: list[str], **_: object) -> list[float | None]:
    """1 for a completion that ends in exactly the right answer, else 0."""
    return [float(answer_in(text) == right) for text, right in zip(completions, answer, strict=True)]


class Progress(TrainerCallback):
    """A line for each entry of the log, in place of all that the trainer knows."""

    def on_log(
        self, args: object, state: TrainerState, control: object, logs: dict[str, float] | None = None, **_: object
    ) -> None:
        if logs is not None and "reward" in logs:
            print(f"step {state.global_step:4d}  reward of the rollouts {logs['reward']:.3f}", flush=True)


def train(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    output = args.output.resolve()  # the adapter keeps its base's path
    base, adapter = output / "base", output / "adapter"
    qsurgeon.rewrite(args.recipe, args.model, base)
    model = qsurgeon.load(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    heldout = make_problems(args.problems, "heldout")
    print(f"training with: {qsurgeon.inspect(model).summary}")
    print(f"before  {accuracy(model, tokenizer, heldout):6.1%} of {len(heldout)} held-out problems", flush=True)

    rows = [
        {"prompt": p.prompt, "answer": str(p.answer)} for p in make_problems(args.steps * args.prompts, seed=args.seed)
    ]
    config = GRPOConfig(
        output_dir=str(output / "trainer"),
        loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=0.0,  # no reference
        per_device_train_batch_size=args.prompts * args.samples, num_generations=args.samples,
        max_completion_length=MAX_NEW_TOKENS, max_steps=args.steps, learning_rate=args.lr, seed=args.seed,
        bf16=False, **NOT_RECOMPUTING, use_cpu=not torch.cuda.is_available(),
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(r=32, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GRPOTrainer(
        model, exact, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
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
