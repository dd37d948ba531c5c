"""What packing a checkpoint costs, in time and in memory, as ratios to copying it, in one run.

python benchmarks/rewrite.py                                  # 3.6 GB, Qwen2.5-1.5B's shapes
python benchmarks/rewrite.py --layers 1 28 118                # 1.0, 3.6 and 12 GB: memory does not grow
python benchmarks/rewrite.py --peer VENV/bin/python           # llm-compressor's model_free_ptq too, from its own venv

Every number is of a whole process, from its start to its end, in turn: ``qsurgeon apply``, and a process that reads and
writes the same files with safetensors. Memory is the most that was resident, less what a process has when it has
imported the same and read nothing.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HIDDEN, INNER, KEYS, VOCABULARY = 1536, 8960, 256, 151936  # of Qwen2.5-1.5B, which has 28 layers
RECIPE = """\
version: 1
storage: packed
rules:
  - target: [layers]
    weight: {format}
"""
COPY = """\
import pathlib, sys
from safetensors.torch import load_file, save_file
source, folder = map(pathlib.Path, sys.argv[1:])
folder.mkdir()
for file in sorted(source.glob("*.safetensors")):
    save_file(load_file(file), folder / file.name, metadata={"format": "pt"})
"""
IMPORTS = """\
import pathlib, sys
import qsurgeon.cli
import qsurgeon.checkpoint
from qsurgeon.surgery import read_config, skeleton
skeleton(read_config(sys.argv[1]))
"""
PEER = """\
import sys
from llmcompressor import model_free_ptq
ignore = ["lm_head", "re:.*embed_tokens"]
model_free_ptq(sys.argv[1], sys.argv[2], scheme="NVFP4A16", ignore=ignore, max_workers=2, device="cpu")
"""


@dataclass(frozen=True)
class Run:
    """How a process ended: seconds from start to end, seconds of all cores, and the most it held, in bytes."""

    seconds: float
    busy: float
    memory: int


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[28])
    parser.add_argument("--format", default="nvfp4", help="of the weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, help="threads; one a core without it")
    parser.add_argument("--peer", type=Path, help="Python of an environment with llm-compressor")
    parser.add_argument("--folder", type=Path, help="where to make the checkpoints; a temporary one without it")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)  # what a process of its own makes
    return parser.parse_args()


def make_checkpoint(folder: Path, layers: int) -> None:
    """Write a Qwen2 checkpoint of bfloat16 noise, four layers a file."""
    import torch
    import transformers
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)

    def weight(*shape: int) -> torch.Tensor:
        count = shape[0] * shape[-1] if len(shape) > 1 else shape[0]
        return noise.repeat(-(-count // len(noise)))[:count].reshape(shape).clone()

    def layer(number: int) -> dict[str, torch.Tensor]:
        outputs = {"q_proj": HIDDEN, "k_proj": KEYS, "v_proj": KEYS, "o_proj": HIDDEN}
        made = {f"self_attn.{name}.weight": weight(rows, HIDDEN) for name, rows in outputs.items()}
        made |= {f"self_attn.{name}.bias": weight(rows) for name, rows in outputs.items() if name != "o_proj"}
        made |= {f"mlp.{name}_proj.weight": weight(INNER, HIDDEN) for name in ("gate", "up")}
        made |= {"mlp.down_proj.weight": weight(HIDDEN, INNER)}
        made |= {f"{name}_layernorm.weight": weight(HIDDEN) for name in ("input", "post_attention")}
        return {f"model.layers.{number}.{name}": tensor for name, tensor in made.items()}

    weight_map: dict[str, str] = {}

    def write(tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    write({"model.embed_tokens.weight": weight(VOCABULARY, HIDDEN)})
    for first in range(0, layers, 4):
        group = range(first, min(first + 4, layers))
        write({name: tensor for number in group for name, tensor in layer(number).items()})
    write({"model.norm.weight": weight(HIDDEN), "lm_head.weight": weight(VOCABULARY, HIDDEN)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    transformers.Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)


def run(*command: str | Path) -> Run:
    """Run a process of its own; its output is shown only if it fails.

    The kernel counts as a process's memory also what its parent had when it started it: this one must stay small.
    """
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen([str(word) for word in command], stdout=said, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(said.read().decode(errors="replace"))
    return Run(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def measure(source: Path, folder: Path, args: argparse.Namespace) -> dict[str, list[Run]]:
    """Return the runs of each way to make a new folder of ``source``."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(format=args.format))
    out = folder / "out"
    threads = ("--workers", str(args.workers)) if args.workers else ()
    ways = {
        "safetensors, a copy": (sys.executable, "-c", COPY, source, out),
        f"qsurgeon, packed {args.format}": (
            *(sys.executable, "-m", "qsurgeon", "apply", recipe, "--model", source, "--output", out),
            *threads,
        ),
    }
    if args.peer:
        ways["llm-compressor, NVFP4A16"] = (args.peer, "-c", PEER, source, out)
    found: dict[str, list[Run]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, command in ways.items():
            found[name].append(run(*command))
            size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
            shutil.rmtree(out)
            print(f"  {name}: {found[name][-1].seconds:.1f} s, writes {size / 1e9:.2f} GB", file=sys.stderr)
    return found


def show(layers: int, source: Path, found: dict[str, list[Run]]) -> None:
    files = list(source.glob("*.safetensors"))
    size, largest = sum(file.stat().st_size for file in files), VOCABULARY * HIDDEN * 2
    baseline = run(sys.executable, "-c", IMPORTS, source).memory
    times = {name: statistics.median(one.seconds for one in runs) for name, runs in found.items()}
    first = next(iter(times.values()))
    print(f"{layers} layers, {size / 1e9:.1f} GB, largest tensor {largest / 1e6:.0f} MB")
    for name, seconds in times.items():
        memory = max(one.memory for one in found[name])
        over = f"{(memory - baseline) / 1e6:7.0f} MB over the imports" if name.startswith("qsurgeon") else ""
        busy = statistics.median(one.busy for one in found[name])
        print(
            f"{name:26} {seconds:7.1f} s {seconds / first:7.3f} x copy {busy:6.1f} s of cores"
            f"{memory / 1e6:6.0f} MB {over}"
        )


def main() -> None:
    args = parse()
    if args.make:
        make_checkpoint(args.make, *args.layers)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for layers in args.layers:
            source = folder / f"qwen2-{layers}"
            if not source.exists():
                run(sys.executable, __file__, "--make", source, "--layers", str(layers))
            show(layers, source, measure(source, Path(temporary), args))


if __name__ == "__main__":
    main()
