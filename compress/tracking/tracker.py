"""What a tracker is, and how one is found by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from compress.errors import SetupError, UsageError

TrackerName = Literal["tensorboard", "mlflow", "wandb"]

_ADAPTERS = {
    "tensorboard": "compress.tracking.tensorboard:TensorBoardTracker",
    "mlflow": "compress.tracking.mlflow:MlflowTracker",
    "wandb": "compress.tracking.wandb:WandbTracker",
}


class Tracker(Protocol):
    """Where a run is shown while it goes on. Where, and as whom, its tool's own environment variables say."""

    def start(self, name: str, options: Mapping[str, Any]) -> None:
        """Begin a run with its options."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""

    def artifact(self, path: Path) -> None:
        """Keep a file."""

    def end(self, succeeded: bool) -> None:
        """End the run."""


def open_tracker(name: str, folder: Path) -> Tracker:
    """Return the tracker called `name`, which has not started.

    Args:
        name: `"tensorboard"`, `"mlflow"` or `"wandb"`.
        folder: where a tracker that writes files writes them.

    Raises:
        UsageError: there is no such tracker.
        SetupError: its package is not installed.
    """
    if name not in _ADAPTERS:
        raise UsageError(f"expected a tracker of {', '.join(_ADAPTERS)}. Received: {name!r}")
    if find_spec(name) is None:
        raise SetupError(f"tracking by {name} needs its package.", f"pip install 'bmcompress[{name}]'")
    module, _, adapter = _ADAPTERS[name].partition(":")
    return getattr(import_module(module), adapter)(folder)


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested options by dotted names; a list's entries are called by their `id`, or their place."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(each, Mapping) for each in value):
            entries = {str(e.get("id") or i) if isinstance(e, Mapping) else str(i): e for i, e in enumerate(value)}
            flat |= flatten(entries, f"{name}.")
        elif value is not None:
            flat[name] = value
    return flat


def plain_name(name: str) -> str:
    """Return a metric's name in characters that every tracker takes; names of outputs are anybody's words."""
    return re.sub(r"[^\w./ -]", "_", name, flags=re.ASCII)[:200]
