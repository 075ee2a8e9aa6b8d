"""`.keras` files in Keras itself, compiled to one graph: what exported files are measured against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np

from compress.deploy.devices import keras_device
from compress.deploy.records import TensorInfo
from compress.deploy.runtimes import FileRuntime, one_line
from compress.deploy.signature import draw_samples, name_outputs, pack_inputs, read_signature
from compress.errors import DataError
from compress.models.opening import load_model


class KerasRuntime(FileRuntime):
    """A loaded `.keras` file, checked first; custom classes need `compress.models.opening.trust_packages`."""

    name = "keras"
    version = keras.__version__

    def __init__(self, path: Path, threads: int, *, device: str = "cpu"):
        applied = _limit_threads(threads)
        self._path = path
        self._device = keras_device(device, keras.backend.backend())
        with keras.device(self._device):
            self._model = load_model(path)
        self._signature = read_signature(self._model)
        super().__init__(self._signature.inputs, (), applied)
        self._step = self._compile()
        first = self._invoke(draw_samples(self._signature, 1, seed=0))
        names = name_outputs(self._model, self._structure)
        self.outputs = tuple(
            TensorInfo(name=name, shape=(None, *array.shape[1:]), dtype=array.dtype.name)
            for name, array in zip(names, first, strict=True)
        )

    def _compile(self) -> Any:
        if keras.backend.backend() != "tensorflow":  # predict_on_batch compiles by itself
            return lambda *flat: self._model.predict_on_batch(pack_inputs(self._signature, list(flat)))
        import tensorflow as tf

        specs = [tf.TensorSpec(info.shape, info.dtype) for info in self.inputs]
        step = tf.function(
            lambda *flat: self._model(pack_inputs(self._signature, list(flat)), training=False),
            input_signature=specs,
        )
        return lambda *flat: step(*(tf.convert_to_tensor(array) for array in flat))

    def _invoke(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        try:
            with keras.device(self._device):
                self._structure = self._step(*arrays)
        except Exception as error:  # user code may run here
            raise DataError(
                f"{self._path} could not run on inputs of shape "
                f"{', '.join(str(array.shape) for array in arrays)}. "
                f"Received: {one_line(error)}"
            ) from error
        return [keras.ops.convert_to_numpy(output) for output in keras.tree.flatten(self._structure)]


def _limit_threads(threads: int) -> int | None:
    """Return `threads` if the backend could be told: TensorFlow allows it only before its first operation."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:
        return None
    return threads
