"""What transformers saves and pushes says what is wrapped, and from which recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from peft import LoraConfig
from versions import adapts

import qsurgeon
from qsurgeon.checkpoint.card import with_record
from qsurgeon.surgery import record_in

ROW = "| `model.layers.{0..2}.mlp.up_proj` | 3 | mxfp4 | mxfp4 | ste | rule `linears` |\n"


@pytest.fixture
def wrapped(tiny_folder: Path) -> Any:
    return qsurgeon.apply("w4a4-mxfp4", hf.AutoModelForCausalLM.from_pretrained(tiny_folder))


def card_of(model: Any) -> str:
    record = record_in(model.config)
    assert record is not None
    return with_record("", record, qsurgeon.inspect(model).summary)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_saved_model_has_its_card_beside_it(wrapped: Any, tmp_path: Path) -> None:
    wrapped.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert card == card_of(wrapped)
    assert ROW in card
    assert qsurgeon.load_recipe("w4a4-mxfp4").text in card
    assert "# tiny-qwen2 in mxfp4\n" in card


def test_a_card_that_is_there_is_left(wrapped: Any, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_only_the_main_process_writes_it(wrapped: Any, tmp_path: Path) -> None:
    wrapped.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


def test_a_plain_model_is_saved_as_ever(wrapped: Any, make_qwen2: Callable[..., Any], tmp_path: Path) -> None:
    make_qwen2().save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


@adapts
def test_an_adapter_is_saved_without_the_card_of_its_base(wrapped: Any, tmp_path: Path) -> None:
    wrapped.add_adapter(LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("loaded", [False, True], ids=["applied", "loaded"])
def test_what_is_pushed_says_what_is_wrapped(hub: Any, wrapped: Any, tmp_path: Path, loaded: bool) -> None:
    wrapped.save_pretrained(tmp_path / "saved")
    model = qsurgeon.load(tmp_path / "saved") if loaded else wrapped
    model.push_to_hub("me/pushed")
    assert hub.repos["me/pushed"]["main"] == files_of(tmp_path / "saved")
    card = hub.repos["me/pushed"]["main"]["README.md"].decode()
    assert card.count(ROW) == 1
    assert qsurgeon.load_recipe("w4a4-mxfp4").text in card
    assert "More Information Needed" not in card


def test_tags_of_a_push_are_on_its_card(hub: Any, wrapped: Any) -> None:
    wrapped.push_to_hub("me/pushed", tags=["mine"])
    card = hub.repos["me/pushed"]["main"]["README.md"].decode()
    assert "tags:\n- qsurgeon\n- mine\n- mxfp4\n" in card


def test_a_card_of_the_repository_is_kept_and_says_it_too(hub: Any, wrapped: Any, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nMy words.\n")
    hub.add("me/pushed", tmp_path)
    for _ in range(2):
        wrapped.push_to_hub("me/pushed")
        card = hub.repos["me/pushed"]["main"]["README.md"].decode()
        assert "license: mit\n" in card
        assert "\n# Mine\n\nMy words.\n" in card
        assert card.count(ROW) == 1


def test_saving_can_push_too(hub: Any, wrapped: Any, tmp_path: Path) -> None:
    wrapped.save_pretrained(str(tmp_path / "out"), push_to_hub=True, repo_id="me/pushed")  # transformers 5.5: no Path
    assert hub.repos["me/pushed"]["main"] == files_of(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text("utf-8") == card_of(wrapped)


def test_a_plain_model_is_pushed_as_ever(hub: Any, wrapped: Any, make_qwen2: Callable[..., Any]) -> None:
    make_qwen2().push_to_hub("me/plain")
    card = hub.repos["me/plain"]["main"]["README.md"].decode()
    assert "More Information Needed" in card
    assert "qsurgeon" not in card


def test_what_was_pushed_is_loaded_wrapped(hub: Any, wrapped: Any) -> None:
    wrapped.push_to_hub("me/pushed")
    assert qsurgeon.inspect(qsurgeon.load("me/pushed")).wrapped == 21
    assert qsurgeon.inspect("me/pushed").wrapped == 21
