"""Who does the work of a pass: our own techniques, or TensorFlow Model Optimization (tfmot)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from compress.options import Options

if TYPE_CHECKING:
    import keras


class EngineOption(Options):
    """The option `engine` of passes whose work tfmot can do too.

    Such a pass lists the options that tfmot has no counterpart for in `ours_alone`.
    """

    engine: Literal["bmcompress", "tfmot"] = "bmcompress"
    """Who does it: `bmcompress`, or `tfmot` on the model rebuilt in tf_keras and brought back, to be compared."""

    @model_validator(mode="after")
    def _known_to_tfmot(self) -> Self:
        if self.engine == "tfmot":
            fields = type(self).model_fields
            for name in type(self).ours_alone():
                value = getattr(self, name)
                if value != fields[name].get_default(call_default_factory=True):
                    raise ValueError(f"expected no {name} with engine: tfmot, which has none. Received: {value!r}")
            if getattr(self, "epochs", 1) == 0:
                raise ValueError("expected epochs of training with engine: tfmot. Received: epochs=0")
        return self

    @classmethod
    def ours_alone(cls) -> tuple[str, ...]:
        """Return the names of options that tfmot has no counterpart for."""
        return ()

    def check_engine(self, model: keras.Model) -> None:
        """Raise an error where tfmot is missing, or `model` holds layers that cannot cross, before any work."""
        if self.engine == "tfmot":
            from compress.legacy.twins import import_tfmot, require_twins

            import_tfmot()
            require_twins(model)
