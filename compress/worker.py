"""Run one function in a fresh child process: `run_in_worker("package.module:function", {...})`.

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
    with tempfile.TemporaryDirectory(prefix="bmcompress-worker-") as folder:
        request, result, log = (Path(folder) / name for name in ("request.json", "result.json", "log.txt"))
        request.write_text(json.dumps({"function": function, "arguments": arguments, "path": sys.path}))
        command = [sys.executable, "-m", "compress.worker", str(request), str(result)]
        with open(log, "wb") as log_file:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log_file,
                env=_child_environment(environment),
                start_new_session=True,
            )
            try:
                _relay_progress(child, description, timeout_s, function)
            finally:
                _end_group(child)
        if child.returncode < 0:
            name = signal.Signals(-child.returncode).name
            raise errors.WorkerError(
                f"{function} crashed in its child process. Received: signal {name}.{_tail(log)}",
                "SIGKILL usually means that memory ran out; SIGSEGV or SIGABRT is a fault in a native library.",
            )
        if not result.exists():
            raise errors.WorkerError(f"{function} ended without a result (exit {child.returncode}).{_tail(log)}")
        answer = json.loads(result.read_text())
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
    if child.stdout:
        child.stdout.close()


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


def _main(request_path: str, result_path: str) -> None:
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
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
