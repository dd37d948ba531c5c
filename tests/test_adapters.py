"""examples/lora_trainer.py and examples/dapo_trl.py, as a user runs them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import qsurgeon

ROOT = Path(__file__).parent.parent
TINY_MATH = ROOT / "examples" / "models" / "tiny-math"
WRAPPED = (
    "92.2% of the parameters are wrapped, "
    "in 42 of 43 Linear modules (4.0% are in no Linear, most in Embedding): "
    "42 with weight mxfp4, input mxfp4"
)


def run(example: str, output: Path, *options: str) -> list[str]:
    """Run the example for two steps; return the lines that it prints."""
    command = [sys.executable, str(ROOT / "examples" / example), "--output", str(output), "--steps", "2"]
    done = subprocess.run([*command, "--problems", "16", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("example", "options", "steps"),
    [
        ("lora_trainer.py", ["--batch-size", "4"], [r"step +1  loss 0\.\d{4}"]),
        (
            "dapo_trl.py",
            ["--prompts", "8", "--samples", "8"],
            [r"step +1  reward of the rollouts 0\.\d{3}", r"step +2  reward of the rollouts 0\.\d{3}"],
        ),
    ],
    ids=["lora_trainer", "dapo_trl"],
)
def test_it_trains_an_adapter_on_a_wrapped_base_that_stays_as_it_was(
    example: str, options: list[str], steps: list[str], tmp_path: Path
) -> None:
    if example == "dapo_trl.py":
        pytest.importorskip("trl")
    lines = run(example, tmp_path, *options)
    expected = [
        re.escape(f"training with: {WRAPPED}"),
        r"before +\d+\.\d% of 16 held-out problems",
        *steps,
        r"after +\d+\.\d% of the same, with: .*% of the parameters are wrapped, in 42 of 43 Linear modules .*: .*mxfp4",
    ]
    assert [line for line, form in zip(lines, expected, strict=True) if not re.fullmatch(form, line)] == []

    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    up = {name: tensor for name, tensor in adapter.items() if "lora_B" in name}  # zero until it is trained
    assert len(up) == 42
    assert [name for name, tensor in up.items() if not tensor.any()] == []
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    base, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", TINY_MATH))
    assert sorted(base) == sorted(source)
    assert [name for name in base if not base[name].equal(source[name])] == []
    assert qsurgeon.inspect(qsurgeon.load(tmp_path / "adapter")).wrapped == 42
