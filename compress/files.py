"""Files that are either whole or not there: written under another name, forced to the disk, renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compress.errors import SetupError

TEMPORARY_PREFIX = ".tmp-"
"""How the name of every unfinished file starts; one that is left after a kill may be deleted."""

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EIO: "the disk reports an input/output error",
}


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its place when the block ends well.

    The temporary name keeps the suffix of `path`. When the block raises, it is removed and whatever was at
    `path` stays as it was.

    Args:
        path: the file to write; a symbolic link is followed. Its folder must exist.

    Raises:
        SetupError: the folder is missing or the file cannot be written: disk full, quota, size limit,
            permission.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}{target.suffix}")
    try:
        if target.is_dir():
            raise SetupError(f"{path} cannot be written: a folder of this name is in the way.")
        if not target.parent.is_dir():
            raise SetupError(f"{path} cannot be written: the folder {target.parent} does not exist.")
        yield temporary
        _force_to_disk(temporary)
        os.replace(temporary, target)
        _force_folder_to_disk(target.parent)
    except Exception as error:
        cause = _disk_error(error)
        if cause is None:
            raise
        ours = cause.filename is None or Path(os.fsdecode(cause.filename)) in (
            temporary,
            target,
            target.parent,
        )
        if not ours and cause.errno in (
            errno.EACCES,
            errno.EPERM,
        ):  # about some other file that the block opened
            raise
        raise SetupError(
            f"{path if ours else os.fsdecode(cause.filename)} cannot be written: {_REASONS[cause.errno]}. "
            f"Received: {os.strerror(cause.errno)} (errno {cause.errno})",
            "Free some space or choose another place; a file that was there before is unchanged.",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sha256_of(path: str | Path) -> str:
    """Return the sha256 of a file's bytes, read piece by piece, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _disk_error(error: BaseException | None) -> OSError | None:
    """Return the error of the disk that is behind `error`; libraries wrap it in errors of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REASONS:
            return error
        error = error.__cause__ or error.__context__
    return None


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _force_folder_to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot do this to a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
