"""What wrapping costs a whole training step, in time and in memory, as ratios to bfloat16, in one run.

python benchmarks/model_step.py                                  # a CPU: 12 layers of Qwen2's shape, compiled
python benchmarks/model_step.py --device cuda --hidden 1536 --tokens 4096

Times are of steps taken in turn in one process. Memory is the most that a process of its own holds during its steps,
beyond what it holds between them: resident memory on a CPU, allocated memory on a GPU. What torch.compile leaves behind
in a process, which differs from model to model, is not of the step.
"""

import argparse
import ctypes
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from timing import medians, take_fresh_memory

import qsurgeon
from qsurgeon.recipe import Recipe, Rule

PLAIN = "bfloat16"
WARM, STEPS = 3, 3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4"], help="of weights and inputs")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="of all threads; for a machine that others work on")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--saved-inputs", choices=("packed", "full"), default="packed")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # what a process of its own measures
    return parser.parse_args()


def make_step(name: str, args: argparse.Namespace) -> Callable[[], None]:
    """Return one training step, without an optimizer, of a model whose linear layers compute in ``name``."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=4096,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(args.hidden // 256, 1),
        use_cache=False,
    )
    model = transformers.Qwen2ForCausalLM(config).bfloat16().to(args.device)
    if name != PLAIN:
        rule = Rule(target=("layers",), weight=name, input=name)
        qsurgeon.apply(Recipe(version=1, saved_inputs=args.saved_inputs, rules=(rule,)), model)
    ids = torch.randint(4096, (2, args.tokens // 2), device=args.device)
    run = model if args.eager else torch.compile(model)

    def step() -> None:
        run(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def peak(name: str, args: argparse.Namespace) -> float:
    """Return how much memory, in MB, steps take beyond what is there between them, once they are compiled and warm."""
    take_fresh_memory()
    step = make_step(name, args)
    for _ in range(WARM):
        step()
    gc.collect()
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts anew
    resting = resident("VmRSS")
    for _ in range(STEPS):
        step()
    return resident("VmHWM") - resting


def resident(line: str) -> float:
    """Return a figure of this process from the kernel, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(one for one in lines if one.startswith(line)).split()[1]) / 1e3


def main() -> None:
    args = parse()
    if args.memory_of:
        print(peak(args.memory_of, args))
        return
    torch._dynamo.config.recompile_limit = 64  # models of several formats in one process share the code of a layer
    names, clock = [PLAIN, *args.formats], time.process_time if args.cpu_time else time.perf_counter
    seconds = medians({name: make_step(name, args) for name in names}, args.rounds, args.device, clock)
    print(
        f"Qwen2, {args.layers} layers of {args.hidden}, {args.tokens} tokens, saved_inputs {args.saved_inputs}, "
        f"{'eager' if args.eager else 'compiled'}, {args.device}, torch {torch.__version__}"
    )
    most = {}
    for name in names:
        command = [sys.executable, *sys.argv, "--memory-of", name]
        most[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        print(
            f"{name:12s} {seconds[name] * 1e3:9.1f} ms {seconds[name] / seconds[PLAIN]:7.3f} x {PLAIN}"
            f" {most[name]:9.0f} MB {most[name] / most[PLAIN]:7.3f} x"
        )


if __name__ == "__main__":
    main()
