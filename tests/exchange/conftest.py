from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exchange_cases import made_recipe

import qsurgeon


@pytest.fixture(scope="session")
def wide_folder(make_qwen2: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16 whose rows are whole blocks of 128, with an output head of its own."""
    folder = tmp_path_factory.mktemp("exchange") / "wide"
    model = make_qwen2(num_hidden_layers=2, hidden_size=128, intermediate_size=256, tie_word_embeddings=False)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def wrapped(wide_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of folders that qsurgeon wrote, of weight, input and storage."""

    def make(weight: str | None, asked: str | None = None, storage: str = "master", **fields: Any) -> Path:
        folder = tmp_path / f"{weight}-{asked}-{storage}"
        qsurgeon.rewrite(made_recipe(weight, asked, storage, **fields), wide_folder, folder)
        return folder

    return make
