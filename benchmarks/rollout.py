"""What a generated token costs in a wrapped model, as ratios to bfloat16, in one run, with transformers' generate.

python benchmarks/rollout.py                                            # 8 layers of 512, one thread
python benchmarks/rollout.py --hidden 2048 --layers 2 --tokens 16       # where memory is the limit

A time is of one token: of generating many, less that of generating one, so that the prompt does not count. Each round
runs all models in turn; the least of the rounds is taken, since what a shared machine adds is never negative.
"""

import argparse
import copy
import time
from typing import Any

import torch
import transformers

import qsurgeon
from qsurgeon.layers import kept_bytes
from qsurgeon.recipe import Recipe, Rule

PLAIN = "bfloat16"
FEW = 2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--formats", nargs="+", default=["mxfp4", "nvfp4", "fp8_e4m3_row"], help="of weights and inputs"
    )
    parser.add_argument("--packed", nargs="*", default=["mxfp4", "nvfp4"], help="the formats that are packed as well")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def make_plain(args: argparse.Namespace) -> Any:
    """Return the model in bfloat16."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=512,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 128,
        tie_word_embeddings=False,
    )
    return transformers.Qwen2ForCausalLM(config).eval().to(torch.bfloat16)


def seconds_of(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Return how long one token takes after the first."""
    taken = []
    for count in (FEW, FEW + tokens):
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        taken.append(time.perf_counter() - start)
    return (taken[1] - taken[0]) / tokens


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    models = {PLAIN: make_plain(args)}
    for storage, formats in (("master", args.formats), ("packed", args.packed)):
        for name in formats:
            rule = Rule(target=("layers",), weight=name, input=name)
            recipe = Recipe(version=1, storage=storage, rules=(rule,))
            models[f"{name}, {storage}"] = qsurgeon.apply(recipe, copy.deepcopy(models[PLAIN]))
    prompt = torch.randint(0, 500, (args.batch, 8))
    taken: dict[str, list[float]] = {name: [] for name in models}
    for count in range(args.rounds + 1):
        for name, model in models.items():
            seconds = seconds_of(model, prompt, args.tokens)
            taken[name] += [seconds] if count else []  # the first round warms up
    print(
        f"Qwen2, {args.layers} layers of {args.hidden}, {args.batch} sequences, {args.threads} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )
    for name, model in models.items():
        least, kept = min(taken[name]), 0 if name == PLAIN else kept_bytes(model)
        ratio = least / min(taken[PLAIN])
        print(f"{name:22s} {least * 1e3:8.2f} ms a token {ratio:7.2f} x {PLAIN}   keeps {kept / 1e6:7.1f} MB")


if __name__ == "__main__":
    main()
