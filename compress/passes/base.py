"""What a pass is: a frozen set of options that takes a model and data and returns a new model.

The same class is the YAML node, the command line's options and the Python API. Third parties subclass `Pass` and name
their class in the entry-point group `compress.passes`.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import StringConstraints, model_validator

from compress.options import Options, Share

if TYPE_CHECKING:
    import keras

    from compress.data.split import Data

INPUT = "input"
"""How a pass names the model that the recipe starts from as its teacher."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""A name that is also a part of file names."""


class ModelFile(Options):
    """A `.keras` file."""

    path: str
    """The file; relative paths count from the recipe's folder."""
    sha256: str | None = None
    """The digest that the file must have, or nothing to accept any."""

    def resolve(self, folder: Path) -> ModelFile:
        """Return the same reference with an absolute path, counted from `folder`."""
        return self.model_copy(update={"path": str((folder / Path(self.path).expanduser()).resolve())})


class Pass(Options):
    """One step of a recipe: model in, new model out; the input model is never changed."""

    changes_structure: ClassVar[bool] = False
    """Whether the pass itself may end with fewer zeros or more distinct values than the model before it had."""

    type: str
    """Which pass this is."""
    id: Name = ""
    """How the recipe, `--set` and the run directory call this step; the type when not given."""
    max_drop: Share | None = None
    """The most that the primary metric may fall in this step, such as `1 pp`."""
    on_fail: Literal["stop", "revert", "warn"] = "stop"
    """What happens when `max_drop` is broken: stop the run, go on with the model before this step, or only say it."""

    @model_validator(mode="before")
    @classmethod
    def _default_id(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("id"):
            return {**values, "id": values.get("type") or cls.model_fields["type"].default}
        return values

    @abstractmethod
    def apply(self, model: keras.Model, data: Data) -> keras.Model:
        """Return a new model; `model` stays as it is."""

    def __call__(self, model: keras.Model, data: Any = None) -> keras.Model:
        """Return a new model made from `model`.

        Args:
            model: the trained Keras model; it is not changed.
            data: `(x, y)`, a `tf.data.Dataset`, a `PyDataset` or `compress.Data`; passes that do not train need none.
        """
        from compress.data.split import as_data

        return self.apply(model, as_data(data))

    def check(self, model: keras.Model) -> None:
        """Raise an error if this pass could not work on `model`; called for every pass before any of them runs."""

    def expectations(self) -> list[str]:
        """Return sentences on what not to expect of this pass; said before time is spent on it."""
        return []

    def notes(self, model: keras.Model) -> list[str]:
        """Return sentences on what this pass left undone in `model`, which it made; a run keeps them."""
        return []

    def record(self) -> dict[str, Any]:
        """Return what the last call of this pass did, as plain values for the manifest."""
        return {}

    def needs_data(self) -> tuple[str, ...]:
        """Return the names of the splits that this pass reads."""
        return ()

    def bind_input(self, file: ModelFile) -> Pass:
        """Return the same pass with `teacher: input` naming `file`, the model that the recipe starts from."""
        return self.model_copy(update={"teacher": file}) if getattr(self, "teacher", None) == INPUT else self

    def model_files(self) -> dict[str, ModelFile]:
        """Return the model files that this pass reads, by option."""
        return {name: value for name, value in self if isinstance(value, ModelFile)}
