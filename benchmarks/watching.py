"""What watching costs a training step of a Qwen2 model, as ratios to one that nobody watches, in one run.

python benchmarks/watching.py                                                           # a CPU
python benchmarks/watching.py --device cuda --hidden 2048 --tokens 4096
"""

import argparse
from collections.abc import Callable

import torch
from timing import medians
from transformers import Qwen2Config, Qwen2ForCausalLM

import qsurgeon

PLAIN, MEASURED, BETWEEN = "unwatched", "every=1", "a step not measured"
TENTH = "every=10 (computed)"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=("w4a4-mxfp4", "w4a4-nvfp4"))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=21)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 128,
    )
    ids = torch.randint(1024, (1, args.tokens), device=args.device)
    print(f"{args.layers} layers, hidden {args.hidden}, {args.tokens} tokens, {args.device}, torch {torch.__version__}")
    for recipe in args.recipes:

        def step(every: int | None) -> Callable[[], None]:
            model = qsurgeon.apply(recipe, Qwen2ForCausalLM(config).to(args.device)).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            watch = None if every is None else qsurgeon.Watch(model, every=every, rows=args.rows)

            def run() -> None:
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if watch is not None:
                    watch.step()

            return run

        seconds = medians({PLAIN: step(None), MEASURED: step(1), BETWEEN: step(10**9)}, args.rounds, args.device)
        # The median of steps of which one in ten is measured would be that of the nine.
        seconds[TENTH] = (seconds[MEASURED] + 9 * seconds[BETWEEN]) / 10
        print(f"\n{recipe}")
        for name, taken in seconds.items():
            print(f"{name:24s} {taken * 1e3:9.1f} ms {taken / seconds[PLAIN]:7.3f} x {PLAIN}")


if __name__ == "__main__":
    main()
