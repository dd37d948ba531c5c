"""examples/accelerate/: what accelerate makes of the configs, and the example under FSDP2; DDP is in test_training."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

import qsurgeon

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "examples" / "accelerate"
FSDP2 = Path(__file__).parent / "accelerate_fsdp2.py"
NESTED = ("fsdp_config", "deepspeed_config")


def written(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CONFIGS / name).read_text())
    return config


def unknown(config: dict[str, Any]) -> set[str]:
    """Return the nested keys that are no option of accelerate launch: its loader drops those in silence."""
    options = {action.dest for action in launch_command_parser()._actions}
    return {key for section in NESTED for key in config.get(section, {}) if key not in options}


def launched(name: str) -> Any:
    """Return the arguments of accelerate launch, with what it reads from the config."""
    parsed = launch_command_parser().parse_args(["--config_file", str(CONFIGS / name), "x.py"])
    return _validate_launch_command(parsed)[0]


def test_every_config_is_listed_with_its_command() -> None:
    text = (CONFIGS / "README.md").read_text()
    files = list(CONFIGS.glob("*.yaml"))
    assert len(files) >= 3
    for file in files:
        assert f"--config_file examples/accelerate/{file.name} examples/train_accelerate.py" in text


@pytest.mark.parametrize(
    ("name", "kind"), [("ddp.yaml", "MULTI_GPU"), ("fsdp2.yaml", "FSDP"), ("deepspeed.yaml", "DEEPSPEED")]
)
def test_accelerate_reads_all_of_a_config(name: str, kind: str) -> None:
    read = load_config_from_file(str(CONFIGS / name))
    assert read.distributed_type == kind
    assert {key: getattr(read, key) for key in written(name)} == written(name)
    assert unknown(written(name)) == set()


def test_a_key_that_accelerate_does_not_know_is_an_error(tmp_path: Path) -> None:
    for name in ("ddp.yaml", "fsdp2.yaml", "deepspeed.yaml"):
        (tmp_path / name).write_text(yaml.safe_dump({**written(name), "mixed_precison": "bf16"}))
        with pytest.raises(ValueError, match=r"unknown keys.*mixed_precison"):
            load_config_from_file(str(tmp_path / name))
    assert unknown({"fsdp_config": {"fsdp_versoin": 2}, "deepspeed_config": {"stage": 2}}) == {"fsdp_versoin", "stage"}


def test_deepspeed_gets_what_its_config_says() -> None:
    args = launched("deepspeed.yaml")
    args.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(args)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return what runs the example in two processes as fsdp2.yaml says, but on CPUs; it returns the output folder."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    base = tmp_path_factory.mktemp("fsdp2")
    environment = {**os.environ, **prepare_multi_gpu_env(launched("fsdp2.yaml")), "ACCELERATE_USE_CPU": "true"}

    def run(name: str, *options: str) -> Path:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(FSDP2)]
        command = [*launch, "--output", str(base / name), "--batch-size", "4", "--lr", "1e-2", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return base / name

    return run


def test_the_example_trains_and_resumes_under_fsdp2(train: Callable[..., Path]) -> None:
    straight = train("straight", "--steps", "3")
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        shards = [file.stat().st_size for file in (straight / "state" / part).glob("*.distcp")]
        assert len(shards) == 2
        assert max(shards) < 1.2 * min(shards)

    resumed = train("resumed", "--steps", "2")
    half = load_file(resumed / "model.safetensors")
    train("resumed", "--steps", "3", "--resume")
    first, second = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert sorted(first) == sorted(second)
    assert [name for name in first if not first[name].equal(second[name])] == []
    assert [name for name in first if first[name].equal(half[name])] == []
    assert qsurgeon.inspect(qsurgeon.load(straight)).wrapped == 42
