"""Recipes: one row of a paper's table each, as a complete config."""

from freeadv_fast.recipes.catalogue import DEFAULTS, RECIPES, find_recipe

__all__ = ["DEFAULTS", "RECIPES", "find_recipe"]
