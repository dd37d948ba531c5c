"""What a scan costs: of weights, as seconds a GB beside reading the file; with data, as passes of the model.

python benchmarks/scan.py                       # 0.8 GB of Qwen2.5-1.5B's shapes, and the bundled model
python benchmarks/scan.py --layers 28           # 3.6 GB

Times are of this process's cores (``time.process_time``), which other programs on the machine do not lengthen.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rewrite import make_checkpoint
from tiny_math import encode, make_problems

import qsurgeon
from qsurgeon.observing import undisturbed

TINY = Path(__file__).parent.parent / "examples/models/tiny-math"
BLOCK = 2**22


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=["w4a16-mxfp4", "w4a16-nvfp4"])
    parser.add_argument("--folder", type=Path, help="where to make the checkpoint; a temporary one without it")
    return parser.parse_args()


def seconds(act: Callable[[], object], rounds: int) -> float:
    """Return the least seconds of cores that ``act`` takes."""
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        act()
        taken.append(time.process_time() - start)
    return min(taken)


def read(folder: Path) -> None:
    """Read the bytes of all weights, and do nothing with them."""
    buffer = bytearray(BLOCK)
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        while os.readv(handle, [buffer]):
            pass
        os.close(handle)


def of_weights(folder: Path, recipes: list[str], rounds: int) -> None:
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    reading = seconds(lambda: read(folder), rounds) / file_bytes * 1e9
    print(f"reading {file_bytes / 1e9:.1f} GB: {reading:.2f} s of cores a GB")
    for recipe in recipes:
        found = qsurgeon.scan(recipe, folder).scan  # compiles what is not compiled yet
        size = sum(row.step.module.weight_bytes for row in found.rows)
        taken = seconds(lambda recipe=recipe: qsurgeon.scan(recipe, folder), rounds) / size * 1e9  # type: ignore[misc]
        print(f"scan of weights, {recipe}: {taken:.1f} s of cores a GB, {taken / reading:.0f} x reading")


def with_data(rounds: int) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    batch = encode(tokenizer, make_problems(64))

    def forward() -> None:
        with undisturbed(model):
            model(batch["input_ids"])

    one = seconds(forward, 3 * rounds)
    for recipe in ("w4a4-mxfp4", "w4a4-nvfp4"):
        qsurgeon.scan(recipe, model, data=[batch])
        start = time.process_time()
        found = qsurgeon.scan(recipe, model, data=[batch]).scan
        taken = time.process_time() - start
        passes = 2 * len(found.rows) + 2
        print(
            f"scan with data, {recipe}, {len(found.rows)} modules: {taken / one:.0f} forward passes, "
            f"{taken / one / passes:.2f} for each of its {passes}"
        )


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)) / f"qwen2-{args.layers}"
        if not folder.exists():
            make_checkpoint(folder, args.layers)
        of_weights(folder, args.recipes, args.rounds)
    with_data(args.rounds)


if __name__ == "__main__":
    main()
