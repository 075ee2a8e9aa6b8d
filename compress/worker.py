"""Run one function in a fresh child process: `run_in_worker("package.module:function", {...})`, or a `Worker` that
starts ahead of its work.

Converters abort, runtimes crash on broken files, and a clean process is the only fair place to measure
start-up and memory. Arguments and result travel as JSON; arrays travel as files that both sides name. In the
child, stdout is redirected to stderr (converters print there) and hashing is seeded, so that what it writes is the
same byte for byte each time.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from compress import errors, progress

_TAIL_LINES = 12


def run_in_worker(
    function: str,
    arguments: dict[str, Any],
    *,
    timeout_s: float = 3600.0,
    description: str | None = None,
    environment: dict[str, str] | None = None,
) -> Any:
    """Return what `function(**arguments)` returns, computed in a fresh process.

    Args:
        function: `"module:function"`; its arguments and result must be JSON.
        arguments: keyword arguments of the function.
        timeout_s: seconds after which the child and its children are killed.
        description: what progress shows, or `None` to show none.
        environment: variables set for the child on top of this process's own.

    Raises:
        BmcompressError: whatever expected error the function raised, with the same class.
        WorkerError: the child crashed, was killed, timed out, or raised anything else.
    """
    with Worker(environment=environment) as worker:
        return worker.run(function, arguments, timeout_s=timeout_s, description=description)


class Worker:
    """A child process that has started and waits for the one function that it is to run; a context manager.

    It starts while the parent has other work to do, which pays where the function's imports take seconds. It ends with
    the block, or with its parent.

    Args:
        preload: modules that it imports while it waits; one that cannot be imported is left to the function.
        environment: variables set for the child on top of this process's own.
    """

    def __init__(self, *, preload: Sequence[str] = (), environment: dict[str, str] | None = None):
        self._folder = tempfile.TemporaryDirectory(prefix="bmcompress-worker-")
        self._request, self._result, self._log = (
            Path(self._folder.name) / name for name in ("request.json", "result.json", "log.txt")
        )
        command = [sys.executable, "-m", "compress.worker", str(self._request), str(self._result), *preload]
        try:
            with open(self._log, "wb") as log_file:
                self._child = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log_file,
                    env=_child_environment(environment),
                    start_new_session=True,
                )
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        _end_group(self._child)
        self._folder.cleanup()

    def run(
        self,
        function: str,
        arguments: dict[str, Any],
        *,
        timeout_s: float = 3600.0,
        description: str | None = None,
    ) -> Any:
        """Return what `function(**arguments)` returns, as `run_in_worker` does; once for each worker."""
        self._request.write_text(json.dumps({"function": function, "arguments": arguments, "path": sys.path}))
        with suppress(BrokenPipeError):  # it has crashed, which is found below
            self._child.stdin.write(b"\n")
            self._child.stdin.flush()
        try:
            _relay_progress(self._child, description, timeout_s, function)
        finally:
            _end_group(self._child)
        if self._child.returncode < 0:
            name = signal.Signals(-self._child.returncode).name
            raise errors.WorkerError(
                f"{function} crashed in its child process. Received: signal {name}.{_tail(self._log)}",
                "SIGKILL usually means that memory ran out; SIGSEGV or SIGABRT is a fault in a native library.",
            )
        if not self._result.exists():
            raise errors.WorkerError(
                f"{function} ended without a result (exit {self._child.returncode}).{_tail(self._log)}"
            )
        answer = json.loads(self._result.read_text())
        if "error" in answer:
            raise _rebuild_error(answer["error"])
        return answer["result"]


def _child_environment(extra: dict[str, str] | None) -> dict[str, str]:
    package_root = str(Path(__file__).resolve().parent.parent)
    paths = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        **os.environ,
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        **(extra or {}),
    }


def _relay_progress(child: subprocess.Popen, description: str | None, timeout_s: float, function: str) -> None:
    """Pass the child's progress lines on until it closes its pipe, then wait for its end."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        _end_group(child)

    timer = threading.Timer(timeout_s, expire)
    timer.daemon = True
    timer.start()
    try:
        if description is None:
            child.stdout.read()
        else:
            _show_lines(child.stdout, description)
        child.wait()
    finally:
        timer.cancel()
    if expired.is_set():
        raise errors.WorkerError(f"{function} did not end in time. Received: timeout_s={timeout_s:g}.")


def _show_lines(lines: Any, description: str) -> None:
    first = next(iter(lines), None)
    if first is None:
        return
    with progress.track(description, total=json.loads(first)["total"]) as advance:
        for line in lines:
            message = json.loads(line)
            advance(message["amount"], message["note"])


def _end_group(child: subprocess.Popen) -> None:
    """Kill the child and whatever it started; a child that has ended is left as it is."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    for stream in (child.stdin, child.stdout):
        with suppress(BrokenPipeError):
            stream.close()


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()[-_TAIL_LINES:]
    return "".join(f"\n    {line[:300]}" for line in lines)


def _rebuild_error(error: dict[str, Any]) -> errors.BmcompressError:
    error_class = getattr(errors, error["class"], errors.WorkerError)
    return error_class(error["message"], error["help"])


class _PipeSink:
    """Progress of the child, as JSON lines on the pipe to its parent: first the total, then each advance."""

    def __init__(self, stream: Any):
        self._stream = stream
        self._open = False

    def start(self, description: str, total: int | None) -> object:
        if self._open:  # one level is enough: the outer task is the one that is shown
            return None
        self._open = True
        print(json.dumps({"total": total}), file=self._stream, flush=True)
        return self

    def advance(self, task: object, amount: int, note: str) -> None:
        if task is self:
            print(json.dumps({"amount": amount, "note": note}), file=self._stream, flush=True)

    def finish(self, task: object) -> None:
        pass


def _main(request_path: str, result_path: str, *preload: str) -> None:
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in preload:
        with suppress(Exception):  # if it is needed, the function fails over it and says so
            importlib.import_module(module)
    if not os.read(0, 1):  # the parent has nothing to run, or has ended
        os._exit(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    request = json.loads(Path(request_path).read_text())
    sys.path.extend(p for p in request["path"] if p not in sys.path)
    module, _, name = request["function"].partition(":")
    try:
        with progress.show_progress(_PipeSink(pipe)):
            answer = {"result": getattr(importlib.import_module(module), name)(**request["arguments"])}
        text = json.dumps(answer)
    except errors.BmcompressError as error:
        details = {"class": type(error).__name__, "message": error.message, "help": error.help}
        text = json.dumps({"error": details})
    Path(result_path).write_text(text)
    sys.stderr.flush()
    os._exit(0)  # native libraries may crash while they unload; the result is already written


if __name__ == "__main__":
    _main(*sys.argv[1:])
