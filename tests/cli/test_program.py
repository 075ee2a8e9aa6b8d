"""The program as a process: signals, a full disk, a closed pipe, and native libraries that talk."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

import compress
from compress.cli.command import command
from compress.progress import track

ROOT = Path(compress.__file__).parent.parent
PROGRAM = [sys.executable, "-c", "from compress.cli import main; main()"]


@pytest.fixture
def recipe(workspace, tmp_path):
    """A recipe file whose training takes minutes unless it is stopped."""
    content = {
        "schema": "bmcompress/recipe/v1",
        "name": "long",
        "model": {"path": str(workspace / "net.keras")},
        "data": {"train": f"npz:{workspace / 'data.npz'}?split=train"},
        "passes": [
            {"id": "first", "type": "finetune", "epochs": 1},
            {"id": "second", "type": "finetune", "epochs": 20_000},
        ],
    }
    (tmp_path / "long.yaml").write_text(json.dumps(content))
    return tmp_path / "long.yaml"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_cleanly_and_what_is_finished_stays(recipe, tmp_path, number, code):
    out = tmp_path / "out"
    command = [*PROGRAM, "run", str(recipe), "-o", str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("second: finetune"):
                break
        time.sleep(1.5)  # into the training of the second pass
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(60) == code
    assert "run the same command again to go on" in rest
    assert "Traceback" not in rest
    assert {p.name for p in out.iterdir()} == {
        ".lock", "recipe.yaml", "manifest.json", "00-input.keras", "01-first.keras",
    }  # fmt: skip
    again = subprocess.run(
        [*command, "--set", "passes.second.epochs=0"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert "first: already done" in again.stderr


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_arrives_in_a_destructor_stops_the_work_all_the_same(quiet):
    steps = []

    class Ending:
        def __del__(self):  # an exception here is printed and dropped
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    @command
    def work(quiet: bool) -> None:
        with track("work", 100) as advance:
            for step in range(100):
                steps.append(step)
                if step == 3:
                    Ending()
                advance()

    with pytest.raises(typer.Exit) as stop:
        work(quiet=quiet)
    assert stop.value.exit_code == 143
    assert steps == [0, 1, 2, 3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_full_disk_exits_8_and_the_old_files_stay(workspace, tmp_path):
    def limit():  # a file may not grow over this size: what a full disk does, without filling one
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    command = [
        *PROGRAM,
        "prune",
        str(workspace / "net.keras"),
        "--epochs",
        "0",
        "--to",
        "none",
        "-o",
        str(tmp_path / "o"),
    ]
    subprocess.run([*command, "--sparsity", "0.5"], cwd=ROOT, check=True, capture_output=True)
    names = ("01-prune.keras", "model.keras")
    before = [(tmp_path / "o" / name).read_bytes() for name in names]
    done = subprocess.run(
        [*command, "--sparsity", "0.6"], cwd=ROOT, capture_output=True, text=True, check=False, preexec_fn=limit
    )
    assert done.returncode == 8, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert [(tmp_path / "o" / name).read_bytes() for name in names] == before


def test_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -c 'from compress.cli import main; main()' recipe schema | head -1; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0"
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


def test_stderr_holds_only_what_we_say(workspace):
    done = subprocess.run(
        [*PROGRAM, "export", str(workspace / "net.keras"), "--to", "tflite", "-o", str(workspace / "exported")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr.splitlines() == ["loading TensorFlow ..."]
    assert "net.tflite" in done.stdout
