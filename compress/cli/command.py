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
from collections.abc import Callable
from typing import Annotated, Any

import typer

from compress.cli.terminal import make_progress, print_error, say
from compress.errors import BmcompressError

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
DataReference = Annotated[
    str | None,
    typer.Option("--data", metavar="REF", help="digits, mnist, npz:FILE, folder:PATH or module:function (see README)."),
]
Rescale = Annotated[str | None, typer.Option("--rescale", help="Multiply the inputs, such as 1/255.")]
Take = Annotated[int | None, typer.Option("--take", min=1, help="Use only this many samples of each split.")]
Skip = Annotated[int | None, typer.Option("--skip", min=0, help="Leave out this many samples of each split first.")]
PrintRecipe = Annotated[bool, typer.Option("--print-recipe", help="Print the recipe that this command runs, and stop.")]


class _Terminated(BaseException):
    """SIGTERM arrived: unwinds like Ctrl-C, so that locks and temporary files go."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command so that expected errors print one line and end with their exit code."""

    @functools.wraps(function)
    def wrapper(**arguments: Any) -> None:
        as_json = bool(arguments.get("json_output"))
        previous = signal.signal(signal.SIGTERM, _raise_terminated)
        try:
            _prepare_environment()
            if arguments.get("quiet"):
                function(**arguments)
            else:
                _with_progress(function, arguments)
            sys.stdout.flush()
        except BmcompressError as error:
            print_error(error, as_json)
            raise typer.Exit(error.exit_code) from None
        except (KeyboardInterrupt, _Terminated) as stop:
            say("stopped; what is finished is kept: run the same command again to go on")
            raise typer.Exit(143 if isinstance(stop, _Terminated) else 130) from None
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        finally:
            signal.signal(signal.SIGTERM, previous)

    return wrapper


def separate_native_messages() -> None:
    """Keep stderr for what we say: native libraries write to descriptor 2 whatever their log level is set to.

    Their messages go to a file without a name. A crash of theirs still shows where it happened.
    """
    noise = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as the process lives
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    os.dup2(noise.fileno(), 2)
    faulthandler.enable(sys.stderr)


def _with_progress(function: Callable[..., None], arguments: dict[str, Any]) -> None:
    from compress.progress import show_progress

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("compress")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with show_progress(make_progress()):
            function(**arguments)
    finally:
        logger.removeHandler(handler)


def _prepare_environment() -> None:
    """Set what the frameworks read when they are imported; a library must not do this, a program may."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_DETERMINISTIC_OPS", "1")  # a resumed run must end with the same bits
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def _raise_terminated(*_: object) -> None:
    raise _Terminated
