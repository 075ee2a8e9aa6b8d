"""The quickstart's two models, really trained on scikit-learn's digits: a teacher, and a student with few labels.

What so small a set can honestly show: a small student that sees 200 labels is lifted by some six points when its
teacher also labels the images that have no label.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import keras

from compress.data.loading import load_data
from compress.data.references import parse_reference
from compress.data.split import Data
from compress.errors import SetupError
from compress.files import atomic_path
from compress.finetuning import fine_tune
from compress.recipe import Recipe, load_recipe
from compress.recipe_library import recipes_folder
from compress.training.options import Training

_SEED = 1


def prepare_quickstart(folder: Path) -> Recipe:
    """Write the recipe, `teacher.keras` and `student.keras` into `folder` and return the recipe.

    Models that are already there are kept, so that a stopped quickstart goes on where it was.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"{folder}: cannot be created: {error.strerror}") from None
    if not (folder / "quickstart.yaml").exists():
        shutil.copyfile(recipes_folder() / "quickstart.yaml", folder / "quickstart.yaml")
    recipe = load_recipe(folder / "quickstart.yaml")
    everything = load_data(parse_reference("digits", rescale="1/16"), base_folder=folder, needs=("train",))
    few_labels = load_data(recipe.data, base_folder=folder, needs=("train",))
    _train(folder / "teacher.keras", build_teacher, everything, Training(epochs=15, learning_rate=2e-3))
    _train(folder / "student.keras", build_student, few_labels, Training(epochs=60, learning_rate=2e-3))
    return recipe


def build_teacher() -> keras.Model:
    """Return an untrained convolutional net of some 60,000 parameters for digits of 8 x 8 pixels."""
    keras.utils.set_random_seed(_SEED)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Dropout(0.3),
            layers.Flatten(),
            layers.Dense(48, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ],
        name="teacher",
    )


def build_student() -> keras.Model:
    """Return an untrained convolutional net of some 4,000 parameters."""
    keras.utils.set_random_seed(_SEED)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            layers.Conv2D(8, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ],
        name="student",
    )


def _train(path: Path, build: Callable[[], keras.Model], data: Data, training: Training) -> None:
    if path.exists():
        return
    model = build()
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    keras.utils.set_random_seed(_SEED)
    fine_tune(model, data, training)
    with atomic_path(path) as temporary:
        model.save(temporary)
