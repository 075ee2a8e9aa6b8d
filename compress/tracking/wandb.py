"""Weights & Biases: `WANDB_PROJECT`, `WANDB_MODE` and its other variables say where; the project is `bmcompress`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from compress.tracking.tracker import plain_name


class WandbTracker:
    """One run beside whatever runs the user has."""

    def __init__(self, folder: Path):
        self._folder = folder

    def start(self, name: str, options: Mapping[str, Any]) -> None:
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "bmcompress"),
            name=name,
            config=dict(options),
            dir=os.environ.get("WANDB_DIR", str(self._folder)),
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log({**metrics, "step": step})  # its own step may never go back, and each pass counts from 1

    def artifact(self, path: Path) -> None:
        self._run.log_artifact(str(path), name=plain_name(path.name).replace("/", "_").replace(" ", "_"), type="file")

    def end(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)
