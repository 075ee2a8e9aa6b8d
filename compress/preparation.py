"""Everything that can be wrong with a recipe's inputs, found out before anything is trained or written."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import keras

from compress.data.loading import load_data
from compress.data.split import Data
from compress.errors import DataError, ModelError
from compress.files import sha256_of
from compress.models.data_fit import fit_data
from compress.models.opening import load_model
from compress.models.task import Task, infer_task
from compress.passes.base import Pass
from compress.recipe import Recipe

logger = logging.getLogger(__name__)

_SAMPLE = 256


@dataclass(frozen=True)
class Inputs:
    """What a run works on.

    Args:
        recipe: the recipe.
        model: the input model.
        passes: the recipe's passes, with the model files that they read pinned to what these hold now.
        data: the splits that the passes and the measurements read, as the model takes them.
        task: what the model is for, or `None` without data.
        allow_imports: packages that may be imported.
        notes: what was chosen for the user.
    """

    recipe: Recipe
    model: keras.Model
    passes: tuple[Pass, ...]
    data: Data
    task: Task | None
    allow_imports: tuple[str, ...]
    notes: tuple[str, ...]


def prepare_inputs(recipe: Recipe, allow_imports: tuple[str, ...] = ()) -> Inputs:
    """Return the checked inputs of a run, and say what was chosen.

    Raises:
        ModelError: a model file is missing, corrupt or unsafe.
        DataError: data are missing or do not fit the model.
        UsageError: a pass could not work on this model, such as a pattern that matches no layer.
    """
    model = load_model(recipe.model.path, sha256=recipe.model.sha256)
    passes = tuple(_pin_files(item.bind_input(recipe.model)) for item in recipe.passes)
    for item in passes:
        item.check(model)
        for sentence in item.expectations():
            logger.info("%s: %s", item.id, sentence)
    data = fit_data(model, _load_splits(recipe, allow_imports))
    task, notes = None, list(data.notes)
    split = data.train or data.test
    if split is not None:
        x, y = split.head(_SAMPLE)
        task = infer_task(model, y, x)
        notes += task.describe()
    for note in notes:
        logger.info("%s", note)
    return Inputs(recipe, model, passes, data, task, allow_imports, tuple(notes))


def _load_splits(recipe: Recipe, allow_imports: tuple[str, ...]) -> Data:
    """Load what the passes read and, for measurements, the test split."""
    required = {name: item.id for item in recipe.passes for name in item.needs_data()}
    optional = {"validation", "unlabelled", "test"} if recipe.passes else {"test"}
    data = load_data(recipe.data, allow_imports=allow_imports, seed=recipe.seed, needs={*required, *optional})
    for name, step in required.items():
        data.require(name, f"the pass {step!r}")
    judged = [f"`max_drop` of the pass {item.id!r}" for item in recipe.passes if item.max_drop is not None]
    judged += [f"the budget of {budget.artifact!r}" for budget in recipe.budgets if budget.needs_labels]
    for why in judged:
        if not data.require("test", why).has_labels:
            raise DataError(f"{why} needs labels, and the test split has none.", "Give the test split its labels.")
    return data


def _pin_files(item: Pass) -> Pass:
    """Pin the model files that a pass reads to what they hold now, so that a changed teacher is a changed step."""
    pinned = {}
    for name, file in item.model_files().items():
        try:
            pinned[name] = file.model_copy(update={"sha256": file.sha256 or sha256_of(file.path)})
        except OSError as error:
            raise ModelError(f"{file.path}: cannot be read: {error.strerror} ({item.id}.{name})") from None
    return item.model_copy(update=pinned)
