"""A run directory: locked for one process, cleaned of what a killed one left behind."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import LockedError, SetupError, UsageError
from compress.files import TEMPORARY_PREFIX
from compress.manifest import FILE_NAME

_LOCK = ".lock"
_OURS = {_LOCK, FILE_NAME, "recipe.yaml"}


@contextmanager
def open_run_directory(path: Path) -> Iterator[Path]:
    """Create `path` if need be, lock it for this process, remove unfinished files, and yield it.

    Raises:
        UsageError: the directory holds files that no run wrote; nothing is touched.
        LockedError: another process works in it.
        SetupError: it cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        present = {entry.name for entry in path.iterdir()}
        if present and not present & _OURS:
            raise UsageError(
                f"the output directory holds files that are not a run's. Received: {path}",
                "Name an empty or new directory with -o.",
            )
        lock = open(path / _LOCK, "a+")  # noqa: SIM115 - held open for as long as the run lasts
    except OSError as error:
        raise SetupError(f"{path}: cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel however this process ends
        except OSError:
            lock.seek(0)
            raise LockedError(
                f"another process works in {path}. Received: {lock.read().strip() or 'unknown process'}",
                "Wait for it, or name another directory with -o.",
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()}\n")
        lock.flush()
        for leftover in path.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink(missing_ok=True)
        yield path
