"""What watching costs a training step of a Qwen2 model, as ratios to one that nobody watches, in one run.

python benchmarks/watching.py                                                           # a CPU
python benchmarks/watching.py --device cuda --hidden 2048 --tokens 4096
"""

import argparse
import statistics
import time

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import qsurgeon


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=("w4a4-mxfp4", "w4a4-nvfp4"))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="of all threads; for a machine that others work on")
    parser.add_argument("--rounds", type=int, default=101)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    print(f"{args.layers} layers, hidden {args.hidden}, {args.tokens} tokens, {args.device}, torch {torch.__version__}")
    for recipe in args.recipes:
        plain, cost = measure(recipe, args)
        print(f"\n{recipe}\na step that nobody watches {plain * 1e3:9.1f} ms")
        for every in (1, 10):
            print(f"{f'every={every}':26s} {1e3 * cost / every:10.1f} ms more {1 + cost / every / plain:7.3f} x")


def measure(recipe: str, args: argparse.Namespace) -> tuple[float, float]:
    """Return the median seconds of a step that nobody watches, and by how many one that is watched takes longer.

    Both are of one model, in turn: two models differ by more than that, for their memory lies elsewhere.
    """
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 128,
    )
    ids = torch.randint(1024, (1, args.tokens), device=args.device)
    model = qsurgeon.apply(recipe, Qwen2ForCausalLM(config).to(args.device)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    clock = time.process_time if args.cpu_time else time.perf_counter

    def seconds(watch: qsurgeon.Watch | None) -> float:
        start = clock()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            watch.step()
        if args.device != "cpu":
            torch.accelerator.synchronize()
        return clock() - start

    plain, more = [], []
    for _ in range(args.rounds + 1):
        plain.append(seconds(None))
        with qsurgeon.Watch(model, every=1, rows=args.rows) as watch:
            more.append(seconds(watch) - plain[-1])
    return statistics.median(plain[1:]), statistics.median(more[1:])  # the first ones make the optimizer's state


if __name__ == "__main__":
    main()
