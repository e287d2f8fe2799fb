"""Recipes: one file each, with a function `recipe()` that returns a complete Job."""
