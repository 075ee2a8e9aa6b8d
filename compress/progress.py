"""Progress of long work, reported to whoever listens.

Code that works says `with track("train", total=300) as advance: ... advance()`. Nothing is printed unless
somebody installed a sink with `show_progress`; the command line does, on stderr.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Sink(Protocol):
    """What shows progress. `total` is a number of units of work, or `None` when unknown."""

    def start(self, description: str, total: int | None) -> object: ...

    def advance(self, task: object, amount: int, note: str) -> None: ...

    def finish(self, task: object) -> None: ...


_sink: ContextVar[Sink | None] = ContextVar("progress_sink", default=None)


@contextmanager
def show_progress(sink: Sink) -> Iterator[None]:
    """Send the progress of everything inside the block to `sink`."""
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)


@contextmanager
def track(description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Yield `advance(amount=1, note="")`, to be called as units of work are done."""
    sink = _sink.get()
    if sink is None:
        yield lambda amount=1, note="": None
        return
    task = sink.start(description, total)
    try:
        yield lambda amount=1, note="": sink.advance(task, amount, note)
    finally:
        sink.finish(task)
