"""Child processes: results and errors come back, crashes and hangs become one typed error, progress is passed on."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from compress.errors import DataError, WorkerError
from compress.progress import show_progress, track
from compress.worker import Worker, run_in_worker


def report(value: int) -> dict:
    print("noise on stdout")  # must not disturb the answer
    return {"value": value + 1, "hash_seed": os.environ["PYTHONHASHSEED"]}


def refuse() -> None:
    raise DataError("no such array", "Give another.")


def fail() -> None:
    raise KeyError("a bug")


def crash() -> None:
    ctypes.string_at(0)


def hang() -> None:
    time.sleep(600)


def leave() -> None:
    sys.stderr.write("last words\n")
    sys.stderr.flush()
    os._exit(3)


def work() -> None:
    with track("inner", total=3) as advance:
        for step in range(3):
            advance(note=f"step {step}")


def loaded(module: str) -> list:
    return [module in sys.modules, sys.stdin.read()]


class Recorder:
    def __init__(self):
        self.events = []

    def start(self, description, total):
        self.events.append((description, total))
        return description

    def advance(self, task, amount, note):
        self.events.append(note)

    def finish(self, task):
        self.events.append("finished")


def test_result():
    assert run_in_worker("test_worker:report", {"value": 1}) == {"value": 2, "hash_seed": "0"}


def test_expected_error_comes_back_as_itself():
    with pytest.raises(DataError, match="no such array") as caught:
        run_in_worker("test_worker:refuse", {})
    assert caught.value.help == "Give another."


@pytest.mark.parametrize(
    ("function", "message"),
    [("crash", "signal SIGSEGV"), ("leave", r"exit 3\).*\n.*last words"), ("fail", "KeyError: 'a bug'")],
)
def test_anything_else_is_a_worker_error(function, message):
    with pytest.raises(WorkerError, match=message) as caught:
        run_in_worker(f"test_worker:{function}", {})
    assert caught.value.exit_code == 9


def test_hang_is_ended():
    began = time.monotonic()
    with pytest.raises(WorkerError, match="did not end in time"):
        run_in_worker("test_worker:hang", {}, timeout_s=1.5)
    assert time.monotonic() - began < 30


def test_progress_is_passed_on():
    recorder = Recorder()
    with show_progress(recorder):
        run_in_worker("test_worker:work", {}, description="outer")
    assert recorder.events == [("outer", 3), "step 0", "step 1", "step 2", "finished"]


def test_a_worker_imports_while_it_waits():
    with Worker(preload=["no_such_module", "wave"], environment={"MARK": "1"}) as worker:
        time.sleep(0.1)
        assert worker.run("test_worker:loaded", {"module": "wave"}) == [True, ""]  # and what it runs has no input


def test_a_worker_without_work_ends():
    with Worker(preload=["wave"]) as worker:
        child = worker._child
    assert child.returncode == -signal.SIGKILL
    assert not Path(worker._folder.name).exists()


def test_a_worker_that_ended_before_its_work_is_an_error(tmp_path):
    (tmp_path / "ends_early.py").write_text("import os\nos._exit(7)\n")
    with Worker(preload=["ends_early"], environment={"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}) as worker:
        worker._child.wait(30)
        with pytest.raises(WorkerError, match="exit 7"):
            worker.run("test_worker:report", {"value": 1})


def test_a_worker_ends_with_its_parent():
    """Its input closes then, whatever ended the parent."""
    with Worker() as worker:
        worker._child.stdin.close()
        assert worker._child.wait(30) == 0
