"""The example recipes that ship with the package, found by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from compress.errors import RecipeError


def recipes_folder() -> Path:
    """Return the folder of the example recipes: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def find_recipe(name: str) -> Path:
    """Return the file `name`, or the example recipe called so, or raise RecipeError naming the nearest one."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    examples = {file.stem: file for file in sorted(recipes_folder().glob("*.yaml"))}
    if name in examples:
        return examples[name]
    nearest = difflib.get_close_matches(path.stem, examples, n=1)
    raise RecipeError(
        f"{name}: no such file, and no example recipe is called so",
        f"Did you mean `{nearest[0]}`?" if nearest else f"Example recipes: {', '.join(examples)}.",
    )


def describe_recipes() -> dict[str, str]:
    """Return the description of each example recipe by name."""
    from compress.recipe import load_recipe

    return {file.stem: load_recipe(file).description for file in sorted(recipes_folder().glob("*.yaml"))}


def describe_passes() -> dict[str, str]:
    """Return the first line of each pass's documentation by type."""
    from compress.passes import BUILT_IN, find_pass, plugins

    return {name: (find_pass(name).__doc__ or "").strip().splitlines()[0] for name in (*BUILT_IN, *plugins())}
