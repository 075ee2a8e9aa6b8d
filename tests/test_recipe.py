"""Recipes: every problem with its line, overrides, a round trip through YAML, and a schema that editors can use."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import RecipeError
from compress.recipe import Recipe, load_recipe, recipe_schema
from compress.recipe_library import find_recipe, recipes_folder
from compress.strict_yaml import read_yaml

MINIMAL = """\
schema: bmcompress/recipe/v1
name: small
model: {path: m.keras}
data: digits
passes:
  - {type: prune, sparsity: 50%}
exports: [{format: tflite}]
"""


@pytest.fixture
def write(tmp_path):
    def write_recipe(text: str) -> Path:
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return path

    return write_recipe


def problems(path, overrides=()):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_minimal(write, tmp_path):
    recipe = load_recipe(write(MINIMAL))
    assert recipe.passes[0].sparsity == 0.5
    assert recipe.passes[0].id == "prune"
    assert recipe.model.path == str(tmp_path / "m.keras")


def test_all_problems_at_once_each_with_its_line(write):
    text = MINIMAL.replace("sparsity: 50%", "sparcity: 50%").replace("format: tflite", "format: tflight")
    text += "bugdets: []\n"
    found = problems(write(text)).splitlines()
    assert [line.split("r.yaml:")[1] for line in found] == [
        "6: passes.prune.sparcity: unknown key `sparcity`; did you mean `sparsity`?",
        "7: exports.0.format: Input should be 'tflite' or 'onnx' (got 'tflight')",
        "8: bugdets: unknown key `bugdets`; did you mean `budgets`?",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sparsity: 50%", "sparsity: 180%", "6: passes.prune.sparsity: Input should be less than 1"),
        ("sparsity: 50%", "sparsity: .5.5", "expected a number, a percentage"),
        ("sparsity: 50%", "sparsity: 50%, epochs: -2", "greater than or equal to 0"),
        ("sparsity: 50%", "sparsity: no", "expected a number, a percentage"),
        ("type: prune", "type: prnue", "unknown pass `prnue`; did you mean `prune`? known: cluster, distill, factorize, finetune, prune"),
        ("type: prune", "type: pruning", "did you mean `prune`?"),
        ("type: prune", "kind: prune", "expected a pass such as"),
        ("- {type: prune, sparsity: 50%}", "- {type: prune, sparsity: 1%}\n  - {type: prune, sparsity: 2%}", "two passes have the id `prune`"),
        ("data: digits", "data: digist", "did you mean `digits`?"),
        ("data: digits", "data: {trian: digits}", "4: data.trian: unknown key `trian`; did you mean `train`?"),
        ("data: digits", "data: {train: {type: npz, path: a.npz, tkae: 3}}", "unknown key `tkae`; did you mean `take`?"),
        ("v1", "v2", "1: schema: Input should be 'bmcompress/recipe/v1'"),
        ("name: small", "name: ../up", "2: name:"),
        ("name: small", "seed: 1", "name: is required"),
        ("passes:", "budgets: [{artifact: onnx, file: 3 KiB}]\npasses:", "a budget names the artifact `onnx`"),
        ("passes:", "budgets: [{artifact: tflite, file: 3 KB}]\npasses:", "expected a size such as `110 KiB`"),
        ("passes:", "budgets: [{artifact: tflite, accuracy: {}}]\npasses:", "give at least one of min, max, max_drop"),
    ],
)  # fmt: skip
def test_problem(write, old, new, message):
    assert message in problems(write(MINIMAL.replace(old, new)))


def test_overrides(write):
    path = write(MINIMAL)
    recipe = load_recipe(path, ["passes.prune.sparsity=1e-1", "seed=7", "passes.0.epochs=2", "benchmark.threads=2"])
    assert (recipe.passes[0].sparsity, recipe.seed, recipe.passes[0].epochs, recipe.benchmark.threads) == (
        0.1,
        7,
        2,
        2,
    )
    assert load_recipe(path, ["exports.tflite.format=onnx"]).exports[0].format == "onnx"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("passes.prun.sparsity=0.8", "no entry `prun`"),
        ("passes.prune.sparsity", "expected path=value"),
        ("passes.7.sparsity=1", "no entry `7`"),
        ("passes.prune.sparsity=no", "expected a number"),
        ("pases.prune.sparsity=0.1", "Did you mean `passes`?"),
        ("name.first=x", "holds one value"),
        ("seed=[1", "--set seed: --set:1: not valid YAML"),
    ],
)
def test_bad_override(write, override, message):
    assert message in problems(write(MINIMAL), [override])


def test_written_recipe_loads_to_an_equal_one(write):
    recipe = load_recipe(find_recipe("quickstart"))
    again = load_recipe(write(recipe.to_yaml()))
    assert again == recipe
    assert again.digest() == recipe.digest()


@given(
    sparsity=st.floats(0, 0.999),
    epochs=st.integers(0, 10**6),
    seed=st.integers(0, 2**31 - 1),
    text=st.text(max_size=40),
)
def test_any_recipe_survives_yaml(sparsity, epochs, seed, text):
    source = {
        "schema": "bmcompress/recipe/v1",
        "name": "n",
        "description": text,
        "seed": seed,
        "model": {"path": "/m.keras"},
        "passes": [{"type": "prune", "sparsity": sparsity, "epochs": epochs}],
    }
    recipe = load_recipe(source)
    assert load_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_schema_accepts_what_we_accept_and_refuses_what_we_refuse():
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    examples = [read_yaml(file).value for file in recipes_folder().glob("*.yaml")]
    assert examples
    for example in [*examples, yaml.safe_load(MINIMAL)]:
        assert [error.message for error in validator.iter_errors(example)] == []
    wrong = yaml.safe_load(MINIMAL)
    wrong["passes"][0]["sparcity"] = 1
    messages = [error.message for error in validator.iter_errors(wrong)]
    assert any("sparcity" in message for message in messages)


@pytest.mark.parametrize("file", sorted(recipes_folder().glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_recipes_are_valid_and_described(file):
    assert load_recipe(file).description


def test_python_recipe():
    from compress.passes.prune import MagnitudePruning

    recipe = Recipe(name="n", model="m.keras", passes=(MagnitudePruning(sparsity=0.5),))
    assert load_recipe(recipe).passes == recipe.passes
