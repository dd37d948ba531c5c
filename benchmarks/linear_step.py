"""What wrapping costs a training step of one layer: forward and backward, as ratios to nn.Linear, in one run.

python benchmarks/linear_step.py                                                        # a CPU
python benchmarks/linear_step.py --device cuda --tokens 8192 --inputs 4096 --outputs 4096
"""

import argparse
from collections.abc import Callable

import torch
from timing import medians
from torch import nn

from qsurgeon.formats import get_format
from qsurgeon.layers import Quantization, QuantLinear

PLAIN = "nn.Linear"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=("mxfp4", "nvfp4", "mxfp8"), help="of weight and input")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--outputs", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    made = {"device": args.device, "dtype": torch.bfloat16}
    x, grad = torch.randn(args.tokens, args.inputs, **made), torch.randn(args.tokens, args.outputs, **made)

    def step(layer: nn.Module) -> Callable[[], None]:
        def run() -> None:
            layer(x.detach().requires_grad_()).backward(grad)
            layer.zero_grad(set_to_none=True)

        return run

    acts = {PLAIN: step(nn.Linear(args.inputs, args.outputs, bias=False, **made))}
    for name in args.formats:
        layer = nn.Linear(args.inputs, args.outputs, bias=False, **made)
        QuantLinear.wrap(layer, Quantization(get_format(name), get_format(name)))
        acts[name] = step(layer)
    seconds = medians(acts, args.rounds, args.device)
    print(f"{args.tokens} tokens, {args.inputs} -> {args.outputs}, bfloat16, {args.device}, torch {torch.__version__}")
    for name, taken in seconds.items():
        print(f"{name:12s} {taken * 1e3:9.2f} ms {taken / seconds[PLAIN]:7.3f} x {PLAIN}")


if __name__ == "__main__":
    main()
