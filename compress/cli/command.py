"""What all commands share: options, exit codes, signals, and the environment of the frameworks."""

from __future__ import annotations

import faulthandler
import functools
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from compress.cli.terminal import make_progress, print_error, say
from compress.errors import BmcompressError, BudgetError, InconclusiveError
from compress.progress import Sink, show_progress

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress, only results and errors.")]
AllowImport = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-import",
        metavar="PACKAGE",
        help="Trust this package: model and data may import it. Repeatable.",
    ),
]
Output = Annotated[
    str | None, typer.Option("--output", "-o", metavar="DIR", help="Run directory; continued if it exists.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Override an option, such as passes.prune.sparsity=0.8. Repeatable.",
    ),
]
Track = Annotated[
    list[str] | None,
    typer.Option("--track", metavar="TRACKER", help="Show the run in tensorboard, mlflow or wandb too. Repeatable."),
]
DataReference = Annotated[
    str | None,
    typer.Option("--data", metavar="REF", help="digits, mnist, npz:FILE, folder:PATH or module:function (see README)."),
]
Rescale = Annotated[str | None, typer.Option("--rescale", help="Multiply the inputs, such as 1/255.")]
Take = Annotated[int | None, typer.Option("--take", min=1, help="Use only this many samples of each split.")]
Skip = Annotated[int | None, typer.Option("--skip", min=0, help="Leave out this many samples of each split first.")]
PrintRecipe = Annotated[bool, typer.Option("--print-recipe", help="Print the recipe that this command runs, and stop.")]


class _Stopped(KeyboardInterrupt):
    """A signal asks to stop: unwinds like Ctrl-C, so that locks and temporary files go."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


class _Signals:
    """Raises when SIGINT or SIGTERM arrives, and again when work advances.

    Once is not enough: an exception that a signal raises while Python runs in a destructor or is called back by native
    code is printed and dropped, and the work would go on for hours.
    """

    def __init__(self) -> None:
        self._arrived: int | None = None
        self._previous = {number: signal.signal(number, self._arrive) for number in (signal.SIGINT, signal.SIGTERM)}

    def _arrive(self, number: int, _frame: object) -> None:
        self._arrived = number
        self.check()

    def check(self) -> None:
        """Raise if a signal has arrived."""
        if self._arrived is not None:
            raise _Stopped(self._arrived)

    def restore(self) -> None:
        """Leave signals to those who had them before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class _Stoppable:
    """Progress, shown by `sink` if there is one, at which the work is stopped."""

    def __init__(self, signals: _Signals, sink: Sink | None):
        self._signals, self._sink = signals, sink

    def start(self, description: str, total: int | None) -> object:
        self._signals.check()
        return self._sink and self._sink.start(description, total)

    def advance(self, task: object, amount: int, note: str) -> None:
        self._signals.check()
        if self._sink:
            self._sink.advance(task, amount, note)

    def finish(self, task: object) -> None:
        if self._sink:
            self._sink.finish(task)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that expected errors print one line and end with their exit code."""

    @functools.wraps(function)
    def wrapper(**arguments: Any) -> None:
        as_json = bool(arguments.get("json_output"))
        signals = _Signals()
        try:
            _prepare_environment()
            if arguments.get("quiet"):
                with show_progress(_Stoppable(signals, None)):
                    function(**arguments)
            else:
                with show_progress(_Stoppable(signals, make_progress())), _messages_on_stderr():
                    function(**arguments)
            sys.stdout.flush()
        except BmcompressError as error:
            told = isinstance(error, (BudgetError, InconclusiveError))  # by the report, which is the one document
            print_error(error, as_json and not told)
            raise typer.Exit(error.exit_code) from None
        except _Stopped as stop:
            say("stopped; what is finished is kept: run the same command again to go on")
            raise typer.Exit(128 + stop.number) from None
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        finally:
            signals.restore()

    return wrapper


def separate_native_messages() -> None:
    """Keep stderr for what we say: native libraries write to descriptor 2 whatever their log level is set to.

    Their messages go to a file without a name. A crash of theirs still shows where it happened.
    """
    noise = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as the process lives
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    os.dup2(noise.fileno(), 2)
    faulthandler.enable(sys.stderr)


@contextmanager
def _messages_on_stderr() -> Iterator[None]:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("compress")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _prepare_environment() -> None:
    """Set what the frameworks read when they are imported; a library must not do this, a program may."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_DETERMINISTIC_OPS", "1")  # a resumed run must end with the same bits
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
