"""Checkpoints of other versions: what an older one wrote means what it meant, and what a newer one says is told."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModel

import qsurgeon
from qsurgeon.errors import CheckpointError
from qsurgeon.formats import CATALOG
from qsurgeon.formats.fields import FIELDS
from qsurgeon.recipe import Recipe, Rule
from qsurgeon.surgery import Record, read_record, record_of, versions
from qsurgeon.surgery.record import FormatRecord, RuleRecord
from qsurgeon.words import Behavior

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDERS = sorted(file.parent for file in FIXTURES.glob("*/*/expected.json"))
WHOLE = [folder for folder in FOLDERS if (folder / "config.json").is_file()]
ADAPTERS = [folder for folder in FOLDERS if (folder / "adapter_config.json").is_file()]
told = runpy.run_path(str(FIXTURES / "write.py"))["told"]


def name_of(folder: Path) -> str:
    return str(folder.relative_to(FIXTURES))


def section(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {key: value for key, value in found.items() if key != "quant_method"}


def check(loaded: Any, folder: Path) -> None:
    """Check that a model is what the version that wrote it made of it."""
    expected, found = json.loads((folder / "expected.json").read_text()), told(loaded)
    assert expected["version"] == folder.parent.name
    # A field of a behavior that came later has its default.
    assert found["layers"] == {name: {**Behavior().fields, **layer} for name, layer in expected["layers"].items()}
    torch.testing.assert_close(torch.tensor(found["outputs"]), torch.tensor(expected["outputs"]), rtol=1e-4, atol=1e-5)


def test_there_are_checkpoints_of_each_kind() -> None:
    assert {folder.name for folder in FIXTURES.glob("0.1.0/*")} == {
        *("master", "behavior", "own-formats", "static-scales", "packed", "packed-own-formats", "part"),
        *("adapter-on-master", "adapter-on-packed", "merged"),
    }


@pytest.mark.parametrize("folder", WHOLE, ids=name_of)
def test_a_checkpoint_of_an_older_version_is_what_it_was(folder: Path) -> None:
    check(qsurgeon.load(folder, auto_class=AutoModel if folder.name == "part" else None), folder)


@pytest.mark.parametrize("folder", ADAPTERS, ids=name_of)
def test_an_adapter_of_an_older_version_is_what_it_was(folder: Path) -> None:
    base = qsurgeon.load(folder / json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
    check(PeftModel.from_pretrained(base, folder).eval(), folder)


@pytest.mark.parametrize("folder", WHOLE, ids=name_of)
def test_a_record_that_an_older_version_can_read_is_written_as_it_wrote_it(folder: Path) -> None:
    assert read_record(section(folder), "config.json").to_dict() == section(folder)


@pytest.mark.parametrize("folder", WHOLE, ids=name_of)
def test_what_is_saved_again_can_be_read_by_the_version_that_wrote_it(folder: Path, tmp_path: Path) -> None:
    qsurgeon.load(folder, auto_class=AutoModel if folder.name == "part" else None).save_pretrained(tmp_path)
    before, after = section(folder), section(tmp_path)
    assert after.pop("qsurgeon_version") == qsurgeon.__version__
    assert before.pop("qsurgeon_version") == folder.parent.name
    assert after == before
    with (
        safe_open(folder / "model.safetensors", "pt") as old,
        safe_open(tmp_path / "model.safetensors", "pt") as new,
    ):
        assert sorted(old.keys()) == sorted(new.keys())
        for name in old.keys():  # noqa: SIM118
            assert torch.equal(old.get_tensor(name), new.get_tensor(name)), name


def test_merging_an_adapter_of_an_older_version_makes_what_that_made(tmp_path: Path) -> None:
    folder = FIXTURES / "0.1.0"
    qsurgeon.merge(folder / "adapter-on-master", tmp_path / "merged", folder / "master")
    check(qsurgeon.load(tmp_path / "merged"), folder / "merged")


@pytest.fixture
def data(tiny_qwen2: Any) -> dict[str, Any]:
    """A record that takes the present version: what its rules keep of inputs differs."""
    rules = (
        Rule(target=("layers.0",), weight="mxfp4", saved_inputs="full"),
        Rule(target=("layers.1",), weight="mxfp4"),
    )
    return record_of(qsurgeon.plan(Recipe(version=1, rules=rules), tiny_qwen2), qsurgeon.__version__).to_dict()


def test_what_an_older_version_cannot_say_is_written_as_the_present_one(data: dict[str, Any]) -> None:
    assert (data["version"], versions.PRESENT) == (2, 2)
    assert [rule.get("saved_inputs") for rule in data["rules"]] == ["full", None]
    hows = read_record(data, "config.json").quantizations()
    assert {name.split(".")[2]: how.behavior for name, how in hows.items()} == {
        "0": Behavior(saved_inputs="full"),
        "1": Behavior(),
    }


def test_what_all_rules_say_alike_is_written_as_the_first_version(data: dict[str, Any]) -> None:
    data["rules"][1]["saved_inputs"] = "full"
    lowered = read_record(data, "config.json").to_dict()
    assert (lowered["version"], lowered["saved_inputs"]) == (1, "full")
    assert read_record(lowered, "config.json") == read_record(data, "config.json")


def test_every_version_has_a_way_up_and_a_way_down() -> None:
    assert list(versions.UP) == list(versions.DOWN) == list(range(1, versions.PRESENT))


def test_a_version_is_raised_step_by_step(monkeypatch: pytest.MonkeyPatch, data: dict[str, Any]) -> None:
    """A rehearsal of the next version: it calls the rules' modules otherwise."""

    def up(found: dict[str, Any]) -> dict[str, Any]:
        return {**found, "source": f"{found['source']} raised"}

    def down(found: dict[str, Any]) -> dict[str, Any] | None:
        source = found["source"]
        return {**found, "source": source.removesuffix(" raised")} if source.endswith(" raised") else None

    monkeypatch.setattr(versions, "PRESENT", 3)
    monkeypatch.setitem(versions.UP, 2, up)
    monkeypatch.setitem(versions.DOWN, 2, down)
    first = section(FIXTURES / "0.1.0/master")
    record = read_record(first, "config.json")
    assert (record.version, record.source) == (3, f"{first['source']} raised")
    assert record.to_dict() == first
    assert read_record(data, "config.json").to_dict() == data
    assert record.model_copy(update={"source": "new"}).to_dict()["version"] == 3


@pytest.mark.parametrize("version", [0, 3, "2", True, None, 1.0], ids=repr)
def test_a_version_that_is_not_there_is_an_error(data: dict[str, Any], version: Any) -> None:
    data |= {"version": version, "qsurgeon_version": "1.2.3"}
    with pytest.raises(CheckpointError) as caught:
        read_record(data, "config.json")
    assert str(caught.value) == (
        f"config.json: quantization_config.version is {version!r}; expected a whole number from 1 to 2 (written by "
        f"qsurgeon 1.2.3, and this is {qsurgeon.__version__}: install qsurgeon 1.2.3 or newer)"
    )


@pytest.mark.parametrize(
    ("writer", "end"),
    [
        ("1.2.3", " (written by qsurgeon 1.2.3, and this is {}: install qsurgeon 1.2.3 or newer)"),
        ("0.1.0", " (written by qsurgeon 0.1.0, which is older than this one, {}: it was changed since)"),
        (qsurgeon.__version__, ""),
        (7, ""),
    ],
)
def test_an_unknown_key_is_an_error_that_says_who_wrote_it(data: dict[str, Any], writer: Any, end: str) -> None:
    data["rules"][0] |= {"zebra": 1}
    data["qsurgeon_version"] = writer
    with pytest.raises(CheckpointError) as caught:
        read_record(data, "config.json")
    at = (
        "quantization_config.rules.0.zebra: unknown key"
        if writer != 7
        else ("quantization_config.qsurgeon_version: Input should be a valid string")
    )
    assert str(caught.value) == f"config.json: {at}{end.format(qsurgeon.__version__)}"


def test_a_key_that_a_format_or_a_rule_gets_later_is_written_where_it_is_said() -> None:
    class LaterFormat(FormatRecord):
        jitter: float = 0.0

    class LaterRule(RuleRecord):
        noise: float = 0.0

    plain = next(iter(CATALOG.values())).to_dict()
    assert LaterFormat.model_validate(plain).to_dict() == plain
    assert LaterFormat.model_validate({**plain, "jitter": 1.0}).to_dict() == {**plain, "jitter": 1.0}
    rule: dict[str, Any] = {
        "name": "a",
        "weight": None,
        "input": None,
        "modules": [],
        "excluded": {},
        "gradient": "ste",
    }
    assert LaterRule.model_validate(rule).to_dict() == {**rule, "phases": "both"}
    assert LaterRule.model_validate({**rule, "noise": 1.0}).to_dict() == {**rule, "phases": "both", "noise": 1.0}


def test_what_0_1_0_wrote_of_a_format_and_of_a_rule_is_written_always() -> None:
    old = section(FIXTURES / "0.1.0/behavior")
    assert {*old["formats"]["nvfp4"]} == versions.FORMAT <= {*FIELDS}
    assert {*old["rules"][0]} == versions.RULE
    assert {*old} == {*Record.model_fields, "saved_inputs"} - {"noise"}
