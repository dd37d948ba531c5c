"""How long rounding a tensor takes, as ratios to copying it, measured in one run.

    python benchmarks/fakequant.py                                  # a CPU, [4096, 4096] bfloat16
    python benchmarks/fakequant.py --device cuda --size 8192        # a GPU: also the share of the copy's bandwidth

Peers (torchao, compressed-tensors) take part where they are installed.
"""

import argparse
import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peers import peers
from timing import medians, take_fresh_memory
from torch import Tensor

from qsurgeon.formats import Format, get_format, kernels
from qsurgeon.formats.kernels import native

CLONE, COPY = "clone()", "copy_ into a warm buffer"
DEFAULT = ("mxfp4", "mxfp8", "nvfp4")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=DEFAULT, help="catalogue names")
    parser.add_argument("--size", type=int, default=4096, help="of the square tensor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="on a CPU, torch.compile of the same operations too")
    return parser.parse_args()


def with_kernels(kind: str, act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return ``act`` under one implementation."""

    def run(x: Tensor) -> Tensor:
        before = os.environ.get(kernels.VARIABLE)
        os.environ[kernels.VARIABLE] = kind
        try:
            return act(x)
        finally:
            os.environ.pop(kernels.VARIABLE)
            if before is not None:
                os.environ[kernels.VARIABLE] = before

    return run


def acts_of(format: Format, x: Tensor, *, compiled: bool) -> dict[str, Callable[[], object]]:
    """Return what there is to time of one format."""
    quantized = format.quantize(x)
    acts: dict[str, Callable[[], object]] = {"fake_quantize": lambda: format.fake_quantize(x)}
    if x.device.type == "cpu":
        library = native.library(format, x.dtype)
        out, above = torch.zeros_like(x), quantized.tensor_scale
        if library is not None:
            flat, into = x.unsqueeze(0), out.unsqueeze(0)
            acts["  into a warm buffer (scale given)"] = lambda: library.fake_quantize(flat, into, above, 0)
    acts["quantize + pack"] = lambda: format.quantize(x)
    acts["unpack + dequantize"] = quantized.dequantize
    kinds = ["eager", "compile"] if compiled else ["eager"]
    acts |= {f"fake_quantize, {kind}": partial(with_kernels(kind, format.fake_quantize), x) for kind in kinds}
    return acts | {name: partial(act, x) for name, act in peers(format.name).items()}


def main() -> None:
    args = parse()
    take_fresh_memory()
    torch.manual_seed(0)
    x = torch.randn(args.size, args.size, device=args.device, dtype=torch.bfloat16)
    warm = torch.zeros_like(x)
    where = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    )
    print(f"[{args.size}, {args.size}] bfloat16, {where}, torch {torch.__version__}; medians of {args.rounds} rounds")
    for name in args.formats:
        format = get_format(name).as_weight
        acts = {CLONE: x.clone, COPY: lambda: warm.copy_(x), **acts_of(format, x, compiled=args.compile)}
        seconds = medians(acts, args.rounds, args.device)
        share = "  of copy's bandwidth" if args.device != "cpu" else ""
        print(f"\n{name:36s} {'ms':>9s} {'x clone':>9s} {'x copy_':>9s}{share}")
        for act, taken in seconds.items():
            part = f"  {seconds[COPY] / taken:8.0%}" if share else ""
            print(f"{act:36s} {taken * 1e3:9.2f} {taken / seconds[CLONE]:9.2f} {taken / seconds[COPY]:9.1f}{part}")
        fastest = min((seconds[peer] for peer in peers(name)), default=None)
        if fastest is not None:
            ratios = fastest / seconds["fake_quantize"], fastest / seconds["fake_quantize, eager"]
            print(f"the fastest peer takes {ratios[0]:.1f} x as long as compiled, {ratios[1]:.1f} x as long as eager")


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
