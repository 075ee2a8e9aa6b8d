"""The time of each operator of an exported file, in the runtime that executes it, and the Keras layer it comes from.

ONNX Runtime has a profiler of its own. LiteRT's Python package has none, so there each operator is made a model of its
own and timed alone: what one kernel costs, without what running several together saves or costs. Both stand beside the
time of the whole file, which tells how far the sum can be believed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from compress.deploy.runtimes import detect_format
from compress.errors import UsageError
from compress.measure.profile_records import OperatorTime, Profile
from compress.progress import track
from compress.worker import run_in_worker

METHODS = {
    "onnx": "ONNX Runtime's profiler, whose clock counts whole microseconds; mean of the middle half of the runs",
    "tflite": "each operator alone, as a model of its own, with the call of the interpreter; median of the runs",
}


def profile_file(
    path: str | Path,
    *,
    model: str | Path | None = None,
    threads: int = 1,
    batch: int = 1,
    runs: int = 50,
) -> Profile:
    """Return the time of each operator of a `.tflite` or `.onnx` file, measured in a fresh process.

    Args:
        path: the file.
        model: the `.keras` file that it was exported from, whose layers are then told apart exactly; otherwise they
            are guessed from the names in the file. It is not executed.
        threads: threads of the runtime.
        batch: samples per run; inputs are random.
        runs: timed runs.

    Raises:
        UsageError: a count below 1, or a file of another format.
        ModelError: the file is missing or damaged.
        WorkerError: it crashed its runtime.
    """
    for name, value in (("threads", threads), ("batch", batch), ("runs", runs)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1. Received: {name}={value}")
    file_format = detect_format(Path(path))
    if file_format == "keras":
        raise UsageError(
            f"expected a .tflite or .onnx file. Received: {path}", "Export the model first: bmcompress export."
        )
    known = _layers_of(model) if model is not None else None
    with track(f"profile {Path(path).name}", None):
        arguments = {"path": str(path), "threads": threads, "batch": batch, "runs": runs}
        found = run_in_worker(f"compress.measure.{file_format}_profile:profile", arguments)
    total = sum(each["time_ms"] or 0.0 for each in found["operators"])
    places = place_labels([each["labels"] for each in found["operators"]], known)
    operators = [
        OperatorTime(
            index=index,
            type=each["type"],
            name=each["name"],
            layer=place,
            time_ms=each["time_ms"],
            share=each["time_ms"] / total if each["time_ms"] is not None and total else None,
            provider=each.get("provider"),
            reasons=each.get("reasons", {}),
        )
        for index, (each, place) in enumerate(zip(found["operators"], places, strict=True))
    ]
    return Profile(
        file=str(path),
        format=file_format,
        runtime=found["runtime"],
        threads=threads,
        batch=batch,
        runs=runs,
        method=METHODS[file_format],
        whole_ms=found["whole_ms"],
        operators_ms=total,
        operators=operators,
    )


def place_labels(labels: Sequence[Sequence[str]], known: tuple[str, Collection[str]] | None) -> list[str | None]:
    """Return for each operator the layer that its names tell of, or `None`.

    Args:
        labels: names of each operator, the most telling one first; parts are joined with `"/"`.
        known: name of the model and those of its layers; without them layers are guessed.
    """
    if known is not None:
        from compress.deploy.conversion import Places

        places = Places(sorted(known[1]), known[0])
        return [next((place for label in own if (place := places.layer_path(label))), None) for own in labels]
    # Names in a TFLite file begin with the model's, and each part may have a number more; those in an ONNX file do not.
    all_labels = [label for own in labels for label in own]
    rooted = len({label.split("/")[0] for label in all_labels}) == 1 and any(each.count("/") > 1 for each in all_labels)
    return [next((place for label in own if (place := _guess(label, rooted))), None) for own in labels]


def _guess(label: str, rooted: bool) -> str:
    parts = [re.sub(r"_\d+$", "", part) if rooted else part for part in label.split("/")[:-1]]
    return "/".join(parts[rooted:])


def _layers_of(model: str | Path) -> tuple[str, list[str]]:
    from compress.models.inspection import inspect_model

    summary = inspect_model(model)
    parts = {part for layer in summary.layers for part in layer.path.split("/")}
    return summary.name, sorted(parts)


def median_ms(times_ns: Sequence[int]) -> float:
    """Return the median of nanoseconds in milliseconds."""
    ordered: Any = sorted(times_ns)
    middle = len(ordered) // 2
    return (ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2) / 1e6
