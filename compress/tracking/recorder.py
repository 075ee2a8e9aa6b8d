"""Tracking that can neither stop nor delay a run: a thread does it, and what goes wrong is one warning."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from compress.tracking.tracker import Tracker, flatten, open_tracker, plain_name

logger = logging.getLogger(__name__)

_FLUSH_S = 5.0


class Recorder:
    """One run in any number of trackers.

    Args:
        trackers: by name; none has started.
        flush_s: how long the end waits for trackers that are behind, in seconds.
    """

    def __init__(self, trackers: Mapping[str, Tracker], flush_s: float = _FLUSH_S):
        self._lines = [_Line(name, tracker) for name, tracker in trackers.items()]
        self._flush_s = flush_s

    def start(self, name: str, options: Mapping[str, Any]) -> None:
        """Begin the run; nested options are flattened."""
        self._call("start", name, flatten(options))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add a point to each curve; what is not a finite number is left out."""
        finite = {
            plain_name(name): float(value)
            for name, value in metrics.items()
            if isinstance(value, Real) and math.isfinite(value)
        }
        if finite:
            self._call("log", finite, step)

    def artifact(self, path: Path) -> None:
        """Keep a file."""
        self._call("artifact", path)

    def end(self, succeeded: bool) -> None:
        """End the run, and wait a little for what is still to be sent."""
        self._call("end", succeeded)
        for line in self._lines:
            line.finish()
        deadline = time.monotonic() + self._flush_s
        for line in self._lines:
            line.wait_until(deadline)

    def _call(self, method: str, *arguments: Any) -> None:
        for line in self._lines:
            line.put(method, arguments)


def open_recorder(names: Sequence[str], folder: Path) -> Recorder:
    """Return a recorder for the trackers called `names`.

    Raises:
        UsageError: there is no tracker of a name.
        SetupError: the package of one is not installed.
    """
    return Recorder({name: open_tracker(name, folder) for name in dict.fromkeys(names)})


class _Line:
    """The thread that talks to one tracker, in order; after the first failure it drops everything."""

    def __init__(self, name: str, tracker: Tracker):
        self._name, self._tracker, self._failed = name, tracker, False
        self._queue: SimpleQueue[tuple[str, tuple[Any, ...]] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name=f"bmcompress-{name}", daemon=True)
        self._thread.start()

    def put(self, method: str, arguments: tuple[Any, ...]) -> None:
        self._queue.put((method, arguments))

    def finish(self) -> None:
        self._queue.put(None)

    def wait_until(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("tracking by %s is still busy; what it has not sent is lost", self._name)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if not self._failed:
                method, arguments = item
                self._attempt(getattr(self._tracker, method), arguments)

    def _attempt(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            call(*arguments)
        except Exception as error:  # of somebody else's server, network or quota
            self._failed = True
            reason = " ".join(str(error).split())[:300]
            logger.warning("tracking by %s stopped: %s: %s; the run goes on", self._name, type(error).__name__, reason)
