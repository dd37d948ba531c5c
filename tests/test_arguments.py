"""The public functions, called as people call them by mistake: each error says the right call."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qsurgeon
from qsurgeon.errors import CallError, CheckpointError, QSurgeonError

APPLY, PLAN = "qsurgeon.apply(recipe, model): ", "qsurgeon.plan(recipe, model): "
REWRITE, INSPECT = "qsurgeon.rewrite(recipe, source, destination): ", "qsurgeon.inspect(model): "
LOAD, LOAD_RECIPE = "qsurgeon.load(path): ", "qsurgeon.load_recipe(name): "
FIRST = "the recipe comes first, and here a model (Linear) does; say "
PIPELINE, TRAINER = "a pipeline (Pipeline) is no model", "a trainer (Trainer) is no model"
ITSELF, TEXT = ", with the model itself", "; expected text or a path"
KINDS = "; expected a live one, a config, a folder or a hub id"


class Pipeline:
    """A stand-in of that name: what matters is the class's name."""


class Trainer:
    """Another."""


class Proc(transformers.ProcessorMixin):
    """A processor without parts."""

    def __init__(self) -> None:
        pass


MODEL = torch.nn.Linear(2, 2)
RECIPE = qsurgeon.load_recipe("w4a4-mxfp4")
CONFIG = transformers.Qwen2Config(hidden_size=8)


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        ("apply", (MODEL, "w4a4-mxfp4"), f'{APPLY}{FIRST}qsurgeon.apply("w4a4-mxfp4", model)'),
        ("apply", (MODEL, RECIPE), f"{APPLY}{FIRST}qsurgeon.apply(recipe, model)"),
        ("apply", (MODEL,), f'{APPLY}{FIRST}qsurgeon.apply("w4a4-mxfp4", model)'),
        ("apply", (RECIPE,), f'{APPLY}there is no model; say qsurgeon.apply("w4a4-mxfp4", model){ITSELF}'),
        (
            "apply",
            ("w4a4-mxfp4", "some/folder"),
            f"{APPLY}'some/folder' is text, and this takes a live model; load it first "
            "(from_pretrained('some/folder')), or write another folder: "
            "qsurgeon.rewrite(recipe, 'some/folder', destination)",
        ),
        ("apply", (RECIPE, CONFIG), f"{APPLY}a config (Qwen2Config) is no model"),
        ("apply", (RECIPE, Proc()), f"{APPLY}a processor (Proc) is no model"),
        ("apply", (RECIPE, Pipeline()), f"{APPLY}{PIPELINE}; say qsurgeon.apply(recipe, pipe.model)"),
        ("apply", (RECIPE, Trainer()), f"{APPLY}{TRAINER}; say qsurgeon.apply(recipe, trainer.model)"),
        ("apply", (RECIPE, MODEL.state_dict()), f"{APPLY}a state dict is no model"),
        ("apply", (RECIPE, {}), f"{APPLY}a dict is no model"),
        ("apply", (RECIPE, 3), f"{APPLY}an int is no model"),
        ("apply", (RECIPE, transformers.AutoModel), f"{APPLY}the class AutoModel is no model"),
        ("apply", ({"version": 1}, MODEL), f"{APPLY}a dict is no recipe yet; say qsurgeon.Recipe(**recipe)"),
        ("apply", (None, MODEL), f"{APPLY}None is no recipe; expected the name of one, a file or a Recipe"),
        ("plan", (MODEL, RECIPE), f"{PLAN}{FIRST}qsurgeon.plan(recipe, model)"),
        ("plan", (".", "w4a4-mxfp4"), f"{PLAN}'.' is a folder, and the recipe comes first"),
        ("plan", (RECIPE,), f"{PLAN}None is no model{KINDS}"),
        ("plan", (RECIPE, Trainer()), f"{PLAN}{TRAINER}{KINDS}; say qsurgeon.plan(recipe, trainer.model)"),
        ("inspect", (RECIPE,), f"{INSPECT}a Recipe of qsurgeon is no model{KINDS}"),
        ("inspect", (Pipeline(),), f"{INSPECT}{PIPELINE}{KINDS}; say qsurgeon.inspect(pipe.model)"),
        (
            "rewrite",
            (RECIPE, MODEL, "out"),
            f"{REWRITE}source is a model (Linear); expected text or a path; a live model is changed by "
            'qsurgeon.apply(recipe, model), and saved by save_pretrained("…")',
        ),
        ("rewrite", (".", RECIPE, "out"), f"{REWRITE}'.' is a folder, and the recipe comes first"),
        ("rewrite", (RECIPE, "source"), f"{REWRITE}destination is missing; expected text or a path"),
        ("rewrite", (RECIPE,), f"{REWRITE}source is missing; expected text or a path"),
        (
            "load",
            (MODEL,),
            f"{LOAD}path is a model (Linear); expected text or a path; whether a live model is wrapped, "
            "qsurgeon.inspect(model) says",
        ),
        ("load", (None,), f"{LOAD}path is missing; expected text or a path"),
        (
            "load_recipe",
            ({"version": 1},),
            f"{LOAD_RECIPE}a dict is no name of a recipe; expected text or a path; a recipe that is made in Python is "
            "qsurgeon.Recipe(**dict)",
        ),
        ("load_recipe", (MODEL,), f"{LOAD_RECIPE}a model (Linear) is no name of a recipe{TEXT}"),
        ("load_recipe", (RECIPE,), f"{LOAD_RECIPE}a Recipe of qsurgeon is no name of a recipe{TEXT}"),
    ],
)  # fmt: skip
def test_a_call_with_something_else_is_answered_with_the_right_one(
    function: str, given: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(CallError) as caught:
        getattr(qsurgeon, function)(*given)
    assert str(caught.value) == message
    assert isinstance(caught.value, QSurgeonError)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("ask", ["load", "inspect"])
def test_python_expands_a_home_folder_too(ask: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        getattr(qsurgeon, ask)("~/nowhere")
    assert str(caught.value) == f"{tmp_path}/nowhere: no such folder"


def test_an_address_is_no_folder_to_load_from() -> None:
    with pytest.raises(CheckpointError) as caught:
        qsurgeon.load("https://hf.co/owner/name")
    assert (
        str(caught.value)
        == "https://hf.co/owner/name is an address; the id of that model is owner/name: say that instead"
    )
