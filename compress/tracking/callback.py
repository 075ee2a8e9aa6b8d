"""Tracking of training as Keras callbacks: for the passes of a run, and for anybody's own `fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras

from compress.tracking.recorder import Recorder, open_recorder


class EpochCurves(keras.callbacks.Callback):
    """Adds the logs of each epoch to a run that goes on.

    Args:
        recorder: of the run.
        prefix: what the curves' names begin with, such as the id of a pass.
    """

    def __init__(self, recorder: Recorder, prefix: str = ""):
        super().__init__()
        self._recorder, self._prefix, self._epochs = recorder, f"{prefix}/" if prefix else "", 0

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Log; a second `fit` counts on where the first one ended."""
        self._epochs += 1
        numbers = {f"{self._prefix}{name}": float(value) for name, value in (logs or {}).items()}
        self._recorder.log(numbers, self._epochs)


class Tracking(EpochCurves):
    """Logs the epochs of a `fit` to TensorBoard, MLflow or Weights & Biases, in a run of its own.

        model.fit(x, y, callbacks=[compress.Tracking("mlflow", name="pruned")])

    A tracker that is down is a warning; training neither stops nor waits for it. Where it writes, and as whom, the
    tool's own environment variables say.

    Args:
        *trackers: names: `"tensorboard"`, `"mlflow"`, `"wandb"`.
        name: of the run.
        folder: where a tracker that writes files writes them.

    Raises:
        UsageError: there is no tracker of a name.
        SetupError: the package of one is not installed.
    """

    def __init__(self, *trackers: str, name: str = "fit", folder: str | Path = "."):
        self._names, self._name, self._folder = trackers, name, Path(folder)
        super().__init__(open_recorder(trackers, self._folder))
        self._started = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Begin the run; after the end of one, a new one."""
        if self._started:
            self._recorder, self._epochs = open_recorder(self._names, self._folder), 0
        self._started = True
        self._recorder.start(self._name, {name: value for name, value in self.params.items() if value is not None})

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """End the run."""
        self._recorder.end(succeeded=True)
