"""What the passes that train have in common: a copy of the model, a teacher or labels, and zeros that stay zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from compress.errors import PassError, UsageError
from compress.passes.base import INPUT, ModelFile
from compress.passes.holding import hold_structure

if TYPE_CHECKING:
    import keras

    from compress.data.split import Data
    from compress.pruning.callback import Pruning
    from compress.training.options import Training


def _check_teacher(value: Any) -> Any:
    if value is None or value == INPUT or isinstance(value, ModelFile):
        return value
    if isinstance(value, str):
        return ModelFile(path=value)
    if isinstance(value, dict):
        return ModelFile.model_validate(value)
    if callable(value) and hasattr(value, "get_weights"):  # a keras.Model; Keras is not imported for this
        return value
    raise ValueError("expected {path: FILE.keras}, `input`, or a keras.Model")


TeacherOption = Annotated[
    Any,
    BeforeValidator(_check_teacher),
    PlainSerializer(
        lambda t: t if t is None or isinstance(t, (str, dict)) else _describe_teacher(t), when_used="always"
    ),
    WithJsonSchema({"anyOf": [{"type": "string"}, ModelFile.model_json_schema(), {"type": "null"}]}),
]
"""A teacher: a `.keras` file, `input`, a `keras.Model` (Python only), or none."""


def _describe_teacher(teacher: Any) -> Any:
    return teacher.model_dump(mode="json") if isinstance(teacher, ModelFile) else {"path": f"<{teacher.name}>"}


def resolve_teacher(teacher: Any, input_model: keras.Model) -> keras.Model | None:
    """Return the teacher as a model; a file is opened as safely as any other.

    In a recipe `input` has become the recipe's own model by now; called from Python, it is the model that is given.
    """
    if teacher == INPUT:
        from compress.models.copying import copy_model

        return copy_model(input_model)
    if isinstance(teacher, ModelFile):
        from compress.models.opening import load_model

        return load_model(teacher.path, sha256=teacher.sha256)
    return teacher


def train_copy(
    model: keras.Model,
    data: Data,
    training: Training,
    *,
    teacher: keras.Model | None = None,
    callbacks: Sequence[Pruning] = (),
    temperature: float | None = None,
    alpha: float | None = None,
) -> keras.Model:
    """Return a trained copy of `model`: by its teacher where there is one, by its labels otherwise.

    Without `callbacks`, zeros that earlier passes made stay zero, and weights that share a value go on to do so.
    """
    from compress.models.copying import copy_model

    if teacher is model:
        raise UsageError("a model cannot teach itself as it trains", "Write `teacher: input` to be taught by a copy.")
    copy = copy_model(model)
    callbacks = callbacks or hold_structure(copy)
    try:
        if teacher is None:
            from compress.finetuning import fine_tune

            fine_tune(copy, data, training, callbacks=callbacks)
        else:
            from compress.distillation import distill

            options = {"temperature": temperature, "alpha": alpha}
            given = {name: value for name, value in options.items() if value is not None}
            distill(copy, teacher, data, training=training, callbacks=callbacks, **given)
    except PassError as error:
        error.model = copy  # it holds its last good weights; who catches the error may keep them
        raise
    finally:
        for callback in callbacks:
            callback.remove()
    return copy
