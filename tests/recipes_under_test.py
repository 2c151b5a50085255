"""The recipes as the command line finds them, for tests that need one or walk over all."""

from dataclasses import replace

from ssl_global.command_line import find, recipe_files
from ssl_global.encoders.pretrained import PretrainedConfig
from ssl_global.recipe import Recipe

FUNCTIONS = [(name, function) for name in recipe_files() for function in ("recipe", "demo")]


def load_recipe(recipe_name: str, function: str, /, **encoder) -> Recipe:
    """The recipe, with fields of its encoder changed."""
    _, _, build = find(f"{recipe_name}:{function}", default="")
    recipe = build()
    return replace(recipe, encoder=replace(recipe.encoder, **encoder))


TUNING = [name for name in recipe_files() if isinstance(load_recipe(name, "recipe").encoder, PretrainedConfig)]
