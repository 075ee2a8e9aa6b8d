"""TensorBoard: curves in event files. It shows numbers alone; files and options stay in the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.summary import Writer


class TensorBoardTracker:
    """Writes event files into `folder`."""

    def __init__(self, folder: Path):
        self._folder = folder

    def start(self, name: str, options: Mapping[str, Any]) -> None:
        self._writer = Writer(str(self._folder / "tensorboard"))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def artifact(self, path: Path) -> None:
        pass

    def end(self, succeeded: bool) -> None:
        self._writer.close()
