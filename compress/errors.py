"""The errors a user can meet, each with the exit code that `bmcompress` ends with.

An error says what was expected, then what was received, and `help` says the way out. Anything else that
is raised is a bug and exits with 1.
"""

from __future__ import annotations


class BmcompressError(Exception):
    """Base of every expected error.

    Args:
        message: one sentence: what is wrong, where, and what was received.
        help: the way out, as one sentence, or `None`.
    """

    exit_code = 1

    def __init__(self, message: str, help: str | None = None):
        super().__init__(message)
        self.message = message
        self.help = help

    def __str__(self) -> str:
        return f"{self.message}\n  help: {self.help}" if self.help else self.message


class UsageError(BmcompressError, ValueError):
    """A command line or a call that cannot be understood."""

    exit_code = 2


class RecipeError(BmcompressError, ValueError):
    """A recipe, budget or baseline that is invalid."""

    exit_code = 3


class ModelError(BmcompressError, ValueError):
    """A model file that is missing, corrupt, unsafe or not what it claims to be."""

    exit_code = 4


class DataError(BmcompressError, ValueError):
    """Data that is missing, empty or does not fit the model."""

    exit_code = 4


class PassError(BmcompressError, RuntimeError):
    """A pass that could not do its work, such as a loss that became NaN.

    Attributes:
        model: the model with its last good weights where training was lost, or `None`.
    """

    exit_code = 5
    model: object | None = None


class ExportError(BmcompressError, RuntimeError):
    """An export that failed, or a file whose outputs differ from the model's."""

    exit_code = 5


class BudgetError(BmcompressError):
    """A budget is broken."""

    exit_code = 6


class InconclusiveError(BmcompressError):
    """A budget could be neither confirmed nor refuted, and the caller asked for certainty."""

    exit_code = 7


class SetupError(BmcompressError, RuntimeError):
    """The environment lacks something: a package, a device, disk space."""

    exit_code = 8


class WorkerError(BmcompressError, RuntimeError):
    """A child process crashed, ran out of memory or out of time."""

    exit_code = 9


class LockedError(BmcompressError, RuntimeError):
    """Another process works in this run directory."""

    exit_code = 10
