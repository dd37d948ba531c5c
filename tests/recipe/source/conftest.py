"""Recipes that are written, read and refused in a folder of the test's own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qsurgeon.errors import RecipeError
from qsurgeon.formats import CATALOG
from qsurgeon.recipe import Recipe, load_recipe


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write() -> Callable[[str, str | bytes], Path]:
    """Write a file in the working folder, which is the test's own."""

    def act(name: str, text: str | bytes) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return act


@pytest.fixture
def load(write: Callable[[str, str | bytes], Path]) -> Callable[[str | bytes], Recipe]:
    """Return the recipe that a text says."""
    return lambda text: load_recipe(write("mine.yaml", text))


@pytest.fixture
def complaint(load: Callable[[str | bytes], Recipe]) -> Callable[[str | bytes], str]:
    """Return all that is said about a recipe that says a text."""

    def act(text: str | bytes) -> str:
        with pytest.raises(RecipeError) as caught:
            load(text)
        return str(caught.value)

    return act


@pytest.fixture
def all_of() -> Callable[..., str]:
    """Return the names of all formats there are, and of the recipe's own."""
    return lambda *own: ", ".join(sorted([*CATALOG, *own]))
