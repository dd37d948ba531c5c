"""What one call of a small layer costs: forward, and forward with backward, as ratios to nn.Linear, in one run.

python benchmarks/call.py                      # 64 x 64, 64 rows, one thread
python benchmarks/call.py --rows 1

At this size nearly all of it is the cost of calls, which on a GPU decides whether the device waits for Python. The
least of many rounds is taken, since what a shared machine adds is never negative.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from qsurgeon.formats import get_format
from qsurgeon.layers import PackedLinear, Quantization, QuantLinear

PLAIN = "nn.Linear"
CALLS = 20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4", "fp8_e4m3_row"], help="of weight and input")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    return parser.parse_args()


def least(acts: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the least seconds of each of ``acts``, all run in turn in each round."""
    taken: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(rounds):
        for name, act in acts.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                act()
            taken[name].append((time.perf_counter() - start) / CALLS)
    return {name: min(of) for name, of in taken.items()}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    x, grad = torch.randn(args.rows, args.size), torch.randn(args.rows, args.size)
    layers: dict[str, nn.Module] = {PLAIN: nn.Linear(args.size, args.size)}
    for name in args.formats:
        how = Quantization(get_format(name), get_format(name))
        for kind in (QuantLinear, PackedLinear):
            layer = nn.Linear(args.size, args.size)
            kind.wrap(layer, how)
            layers[f"{name}, {'packed' if kind is PackedLinear else 'master'}"] = layer

    def forward(layer: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                layer(x)

        return run

    def step(layer: nn.Module) -> Callable[[], None]:
        def run() -> None:
            layer(x.detach().requires_grad_()).backward(grad)
            layer.zero_grad(set_to_none=True)

        return run

    print(f"{args.size} x {args.size}, {args.rows} rows, {args.threads} threads, float32, torch {torch.__version__}")
    both = {act.__name__: least({n: act(one) for n, one in layers.items()}, args.rounds) for act in (forward, step)}
    for name in layers:
        shown = (f"{act} {of[name] * 1e6:7.1f} us {of[name] / of[PLAIN]:5.2f} x" for act, of in both.items())
        print(f"{name:22s}", "   ".join(shown))


if __name__ == "__main__":
    main()
