"""Commands about recipes: run one, and validate, show and list them."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from compress.cli.command import AllowImport, Json, Output, Overrides, Quiet, Track, command

recipe_app = typer.Typer(help="Validate, show and list recipes.", no_args_is_help=True)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of an example recipe.")]


@command
def run(
    recipe: RecipeFile,
    output: Output = None,
    set_: Overrides = None,
    track: Track = None,
    allow_import: AllowImport = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run every step anew instead of going on.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")] = False,
    json_output: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: its passes in order, the exports, the benchmark and the budgets."""
    from compress.recipe import load_recipe
    from compress.recipe_library import find_recipe

    loaded = load_recipe(find_recipe(recipe), [*(set_ or ()), *tracking_override(track)])
    if dry_run:
        _show_plan(loaded, output, json_output)
        return
    run_and_show(loaded, output, allow_import, fresh=fresh, json_output=json_output)


def tracking_override(trackers: list[str] | None) -> list[str]:
    """Return the override that `--track` stands for."""
    return [f"tracking=[{', '.join(trackers)}]"] if trackers else []


def run_and_show(recipe: Any, output: str | None, allow_import: Any, *, fresh: bool, json_output: bool) -> None:
    """Run a loaded recipe, print its table or JSON, and end with the exit code of its budgets."""
    from compress.cli.terminal import print_json, print_table, say

    if "tensorflow" not in sys.modules:
        say("loading TensorFlow ...")
    from compress.gate.verdicts import raise_for_verdicts
    from compress.runner import run as run_recipe

    result = run_recipe(
        recipe, output, allow_imports=tuple(allow_import or ()), fresh=fresh, raise_on_broken_budget=False
    )
    if json_output:
        print_json(result.to_dict())
    else:
        print_table(*result.rows(), title=f"{recipe.name}: {result.directory}")
        if result.manifest.verdicts:
            print_table(*result.verdict_rows(), title="budgets")
        for line in result.summary():
            print(line)
    raise_for_verdicts(result.manifest.verdicts)


def _show_plan(recipe: Any, output: str | None, json_output: bool) -> None:
    from compress.cli.terminal import print_json, print_table
    from compress.plan import plan_run

    plan = plan_run(recipe, output)
    if json_output:
        print_json(plan)
        return
    for line in plan["data"]:
        print(line)
    print_table(
        ("step", "what", "writes"),
        [(s["step"], s["what"], s["writes"]) for s in plan["steps"]],
        title=plan["directory"],
    )
    for line in plan["expectations"]:
        print(line)


@recipe_app.command("validate")
@command
def validate(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Recipe files.")],
    set_: Overrides = None,
    json_output: Json = False,
) -> None:
    """Check recipes without running them; every problem is named with its line."""
    from compress.cli.terminal import print_json
    from compress.errors import RecipeError
    from compress.recipe import load_recipe
    from compress.recipe_library import find_recipe

    problems = []
    for name in recipes:
        try:
            load_recipe(find_recipe(name), set_ or ())
        except RecipeError as error:
            problems.append(str(error))
        else:
            if not json_output:
                print(f"{name}: valid")
    if problems:
        raise RecipeError("\n".join(problems))
    if json_output:
        print_json({"valid": recipes})


@recipe_app.command("show")
@command
def show(recipe: RecipeFile, set_: Overrides = None, json_output: Json = False) -> None:
    """Print a recipe with every default and override filled in."""
    from compress.cli.terminal import print_json
    from compress.recipe import load_recipe
    from compress.recipe_library import find_recipe

    loaded = load_recipe(find_recipe(recipe), set_ or ())
    if json_output:
        print_json(loaded.to_dict())
    else:
        print(loaded.to_yaml(), end="")


@recipe_app.command("schema")
@command
def schema(
    of: Annotated[str, typer.Option("--of", help="recipe, budget, benchmark, manifest or inspect.")] = "recipe",
) -> None:
    """Print JSON Schema for editors and for readers of our JSON."""
    from compress.cli.terminal import print_json
    from compress.schemas import published_schema

    print_json(published_schema(of))


@recipe_app.command("list")
@command
def list_recipes(json_output: Json = False) -> None:
    """List the example recipes and the passes that recipes may use."""
    from compress.cli.terminal import print_json, print_table
    from compress.recipe_library import describe_passes, describe_recipes

    recipes, passes = describe_recipes(), describe_passes()
    if json_output:
        print_json({"recipes": recipes, "passes": passes})
        return
    print_table(("recipe", "what it does"), recipes.items())
    print()
    print_table(("pass", "what it does"), passes.items())
