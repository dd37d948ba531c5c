"""What watching costs a training step of a Qwen2 model, as ratios to one that nobody watches, in one run.

Twice: by how much watched steps take longer, which has all in it and the noise of whole steps as well; and how long a
Watch's own code ran, to which a loaded machine does less.

python benchmarks/watching.py                                                           # a CPU
python benchmarks/watching.py --device cuda --hidden 2048 --tokens 4096
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import qsurgeon
from qsurgeon.watch import training


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=("w4a4-mxfp4", "w4a4-nvfp4"))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="of all threads; for a machine that others work on")
    parser.add_argument("--rounds", type=int, default=20)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    inside = Inside(time.process_time if args.cpu_time else time.perf_counter)
    print(f"{args.layers} layers, hidden {args.hidden}, {args.tokens} tokens, {args.device}, torch {torch.__version__}")
    for recipe in args.recipes:
        plain, more, within = measure(recipe, args, inside)
        print(f"\n{recipe}\n{'a step that nobody watches':26s} {plain * 1e3:9.1f} ms")
        for what, cost in (("longer", more), ("in its own code", within)):
            for every in (1, 10):
                share = cost / every / plain
                print(f"{f'every={every}, {what}':26s} {1e3 * cost / every:9.1f} ms {share:8.2%}")


def measure(recipe: str, args: argparse.Namespace, inside: "Inside") -> tuple[float, float, float]:
    """Return the median seconds of a step that nobody watches, by how many a watched one is longer, and its Watch's.

    All are of one model, in turn: two models differ by more than that, for their memory lies elsewhere.
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

    def seconds(watch: qsurgeon.Watch | None) -> float:
        start = inside.clock()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if watch is not None:
            watch.step()
        if args.device != "cpu":
            torch.accelerator.synchronize()
        return inside.clock() - start

    def watched() -> tuple[float, float]:
        with qsurgeon.Watch(model, every=1, rows=args.rows) as watch:
            inside.seconds = 0.0
            return seconds(watch), inside.seconds

    seconds(None)  # makes the optimizer's state
    plain, more, within = [], [], []
    for number in range(args.rounds):
        before = seconds(None) if number % 2 else None  # each comes second as often as the other
        taken, own = watched()
        plain.append(seconds(None) if before is None else before)
        more.append(taken - plain[-1])
        within.append(own)
    return statistics.median(plain), statistics.median(more), statistics.median(within)


class Inside:
    """Seconds that ran in a Watch's hooks and in its ``step``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds = clock, 0.0
        window: Any = training._Window
        training.Watch.step = self._timed(training.Watch.step)  # type: ignore[method-assign]
        make = window._after
        window._after = lambda *args: self._timed(make(*args))

    def _timed(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = self.clock()
            result = act(*args)
            self.seconds += self.clock() - start
            return result

        return timed


if __name__ == "__main__":
    main()
