"""Recipes: what the user writes, and which modules it matches. Knows text and names, nothing of models.

A name is imported when it is used: to find a recipe's file needs no torch, which what it may say does.
"""

import importlib
from typing import TYPE_CHECKING, Any

from qsurgeon.recipe.find import find_recipe, said, shipped_recipes

if TYPE_CHECKING:
    from qsurgeon.recipe.schema import FormatSpec, Recipe, Rule
    from qsurgeon.recipe.source import load_recipe

__all__ = ["FormatSpec", "Recipe", "Rule", "find_recipe", "load_recipe", "said", "shipped_recipes"]

_HOME = {"FormatSpec": "schema", "Recipe": "schema", "Rule": "schema", "load_recipe": "source"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qsurgeon.recipe' has no attribute '{name}'")
    return getattr(importlib.import_module(f"qsurgeon.recipe.{_HOME[name]}"), name)
