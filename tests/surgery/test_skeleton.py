"""Models that bring their own code: it is run if the caller says so, and never else."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import dynamic_module_utils

from qsurgeon.errors import CheckpointError
from qsurgeon.surgery import architecture, inventory, read_config, skeleton

CONFIGURATION = """
from pathlib import Path

from transformers import PreTrainedConfig

Path({ran!r}).write_text("configuration")


class OwnConfig(PreTrainedConfig):
    model_type = "qsurgeon_own"

    def __init__(self, width=8, **kwargs):
        self.width = width
        super().__init__(**kwargs)
"""
MODELING = """
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from .configuration_own import OwnConfig

Path({ran!r}).write_text("modeling")


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.up = nn.Linear(config.width, 2 * config.width)
        self.post_init()


class OwnForCausalLM(OwnModel):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = nn.Linear(2 * config.width, 16)
        self.post_init()


class NoModel:
    pass
"""
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModel": "modeling_own.OwnModel",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    "AutoModelForMaskedLM": "modeling_own.NoModel",
    "AutoTokenizer": ["tokenization_own.Slow", None],
}
OWN = {"model_type": "qsurgeon_own", "width": 4, "architectures": ["OwnForCausalLM"], "auto_map": AUTO_MAP}

Make = Callable[..., Path]


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that the model's code leaves as soon as it is run."""
    return tmp_path / "ran"


@pytest.fixture
def make(tmp_path: Path, ran: Path) -> Make:
    """Return a maker of a folder with code of its own; its keywords replace fields of its config."""

    def make(**fields: Any) -> Path:
        folder = tmp_path / "own"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(OWN | fields))
        (folder / "configuration_own.py").write_text(CONFIGURATION.format(ran=str(ran)))
        (folder / "modeling_own.py").write_text(MODELING.format(ran=str(ran)))
        return folder

    return make


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let transformers copy the code to a folder of the test's own, and forget it afterwards."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def not_trusted(folder: Path, what: str) -> str:
    return (
        f"{folder}: transformers {transformers.__version__} has no {what}; the model brings its own code (auto_map in "
        "its config.json), which is not run unless you say so. Read it, then pass --trust-remote-code (in Python, "
        "trust_remote_code=True)"
    )


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    return str(caught.value)


def test_a_model_of_its_own_code_is_refused_and_nothing_is_run(make: Make, ran: Path) -> None:
    folder = make()
    assert refused(lambda: read_config(folder)) == not_trusted(folder, "model type 'qsurgeon_own'")
    assert not ran.exists()


def test_a_model_of_its_own_code_is_built_if_it_is_trusted(make: Make, ran: Path) -> None:
    config = read_config(make(), trust_remote_code=True)
    assert ran.read_text() == "configuration"
    model = skeleton(config, trust_remote_code=True)
    assert ran.read_text() == "modeling"
    assert type(model).__name__ == "OwnForCausalLM"
    assert [(module.name, module.shape) for module in inventory(model)] == [("up", (8, 4)), ("lm_head", (16, 8))]
    assert {one.device.type for one in model.parameters()} == {"meta"}


def test_without_architectures_it_is_the_base_model_of_its_own_code(make: Make) -> None:
    config = read_config(make(architectures=None), trust_remote_code=True)
    assert type(skeleton(config, trust_remote_code=True)).__name__ == "OwnModel"


@pytest.mark.parametrize(
    ("architectures", "what"), [(["OwnForCausalLM"], "architecture 'OwnForCausalLM'"), (None, "model for a OwnConfig")]
)
def test_trust_in_the_config_is_none_in_the_model(make: Make, ran: Path, architectures: Any, what: str) -> None:
    folder = make(architectures=architectures)
    config = read_config(folder, trust_remote_code=True)
    assert refused(lambda: skeleton(config)) == not_trusted(folder, what)
    assert ran.read_text() == "configuration"


def test_an_architecture_of_its_own_with_a_config_of_transformers_is_refused(
    make: Make, ran: Path, qwen2_config: Callable[..., Any]
) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    fields = qwen2_config().to_dict() | {"architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    folder = make(**fields)
    config = read_config(folder)
    assert type(config).__name__ == "Qwen2Config"
    assert refused(lambda: architecture(config)) == not_trusted(folder, "architecture 'OwnForCausalLM'")
    assert not ran.exists()
    assert architecture(config, trust_remote_code=True).__name__ == "OwnForCausalLM"


def test_code_that_transformers_needs_not_is_not_run(make: Make, ran: Path, qwen2_config: Callable[..., Any]) -> None:
    auto_map = AUTO_MAP | {"AutoModelForCausalLM": "modeling_own.Qwen2ForCausalLM"}
    config = read_config(make(**qwen2_config().to_dict(), auto_map=auto_map))
    assert type(skeleton(config)) is transformers.Qwen2ForCausalLM
    assert not ran.exists()


def test_trust_does_not_help_a_model_type_that_has_no_code(make: Make, ran: Path) -> None:
    folder = make(model_type="qwem2", auto_map={"AutoModel": "modeling_own.OwnModel"})
    message = refused(lambda: read_config(folder, trust_remote_code=True))
    assert message.startswith(f"{folder}: transformers {transformers.__version__} has no model type 'qwem2'; ")
    assert not ran.exists()


@pytest.mark.parametrize("auto_map", ["configuration_own.OwnConfig", ["AutoConfig"], {"AutoConfig": None}, 1], ids=str)
def test_an_auto_map_that_is_none_is_no_code(make: Make, auto_map: Any) -> None:
    folder = make(auto_map=auto_map)
    message = refused(lambda: read_config(folder, trust_remote_code=True))
    assert message.startswith(f"{folder}: transformers {transformers.__version__} has no model type 'qsurgeon_own'")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: (folder / "configuration_own.py").unlink(), "no model at '{folder}': "),
        (lambda folder: (folder / "configuration_own.py").write_text("def"), "no model at '{folder}': "),
        (
            lambda folder: (folder / "configuration_own.py").write_text("import nothing_of_that_name"),
            "no model at '{folder}': This modeling file requires the following packages that were not found in your "
            "environment: nothing_of_that_name. ",
        ),
    ],
    ids=["missing", "no-python", "package-missing"],
)
def test_code_that_cannot_be_run_is_an_error(make: Make, change: Callable[[Path], Any], expected: str) -> None:
    folder = make()
    change(folder)
    message = refused(lambda: read_config(folder, trust_remote_code=True))
    assert message.startswith(expected.format(folder=folder))


def test_a_modeling_file_that_is_missing_is_an_error(make: Make) -> None:
    folder = make()
    config = read_config(folder, trust_remote_code=True)
    (folder / "modeling_own.py").unlink()
    message = refused(lambda: skeleton(config, trust_remote_code=True))
    assert message.startswith(f"{folder}: its own code cannot be run: ")


def test_a_class_of_its_own_that_is_no_model_is_an_error(make: Make) -> None:
    folder = make(architectures=["NoModel"])
    config = read_config(folder, trust_remote_code=True)
    assert refused(lambda: skeleton(config, trust_remote_code=True)) == (
        f"{folder}: 'modeling_own.NoModel' of its own code is no transformers model"
    )


def test_an_unknown_architecture_without_code_names_the_nearest(qwen2_config: Callable[..., Any]) -> None:
    message = refused(lambda: architecture(qwen2_config(architectures=["Qwen2ForCausalML"])))
    assert message.startswith(
        f"transformers {transformers.__version__} has no architecture 'Qwen2ForCausalML'; the nearest it has: "
        "'Qwen2ForCausalLM', "
    )


@pytest.mark.parametrize("names", ["Qwen2ForCausalLM", [1], {"Qwen2ForCausalLM": 1}], ids=str)
def test_architectures_that_are_no_names_are_an_error(qwen2_config: Callable[..., Any], names: Any) -> None:
    config = qwen2_config()
    vars(config)["architectures"] = names  # older transformers refuse it themselves where it is set
    assert refused(lambda: architecture(config)) == (
        f"'architectures' in config.json expects a list of names, got {names!r}"
    )
