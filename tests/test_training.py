"""examples/train_accelerate.py, as a user runs it: in one process, and in two."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import qsurgeon

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "train_accelerate.py"
DDP = ROOT / "examples" / "accelerate" / "ddp.yaml"
TINY_MATH = ROOT / "examples" / "models" / "tiny-math"


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with random weights: how fast it learns depends on no processor's last bit."""
    folder = tmp_path_factory.mktemp("models") / "untrained"
    shutil.copytree(TINY_MATH, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def train(processes: int, output: Path, steps: int, *options: str) -> tuple[str, list[float]]:
    """Run the example; return what it says it trains with, and the losses it prints (first, each tenth, last)."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "accelerate.commands.launch", "--config_file", str(DDP), "--num_processes", str(processes)]
    command = [*launch, str(SCRIPT), "--output", str(output), "--steps", str(steps), "--batch-size", "8", *options]
    # With --cpu, accelerate launch would start one process, whatever --num_processes says.
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((output / "state").glob("random_states_*.pkl"))) == processes
    first, *rest = done.stdout.splitlines()
    return first, [float(found[1]) for line in rest if (found := re.search(r"loss ([\d.]+)", line))]


@pytest.mark.parametrize("processes", [1, 2], ids=["one-process", "two-processes"])
def test_the_loss_falls_and_a_resumed_run_is_bit_identical_to_one_that_went_on(
    processes: int, untrained: Path, tmp_path: Path
) -> None:
    said, losses = train(processes, tmp_path / "straight", 41, "--model", str(untrained))
    assert said == (
        "training with: 92.2% of the parameters are wrapped, "
        "in 42 of 43 Linear modules (4.0% are in no Linear, most in Embedding): "
        "42 with weight mxfp4, input mxfp4"
    )
    assert losses[-1] < 0.8 * losses[0]

    train(processes, tmp_path / "resumed", 40, "--model", str(untrained))
    _, further = train(processes, tmp_path / "resumed", 41, "--resume")
    assert further == losses[-1:]
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "resumed"))
    assert sorted(straight) == sorted(resumed)
    assert [name for name in straight if not straight[name].equal(resumed[name])] == []
    assert qsurgeon.inspect(qsurgeon.load(tmp_path / "straight")).wrapped == 42


def test_the_example_fits_in_a_hundred_lines() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 100
