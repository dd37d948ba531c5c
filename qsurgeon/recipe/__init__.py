"""Recipes: what the user writes, and which modules it names. Knows text and names, nothing of models."""

from qsurgeon.recipe.schema import FormatSpec, Recipe, Rule
from qsurgeon.recipe.source import find_recipe, load_recipe, shipped_recipes

__all__ = ["FormatSpec", "Recipe", "Rule", "find_recipe", "load_recipe", "shipped_recipes"]
