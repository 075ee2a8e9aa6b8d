"""Parity: an exported file is run in its runtime and its outputs are compared with those of the Keras model.

The file runs in a child process, because a runtime may crash on a file, and in one that has never imported
TensorFlow, because that is how users run it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.deploy.runtimes import open_runtime
from compress.errors import DataError, ExportError, ModelError, WorkerError
from compress.worker import run_in_worker


@dataclass(frozen=True)
class Limit:
    """How far outputs may be from their reference.

    Args:
        tolerance: largest `Difference.excess`; `None` where only the mean difference in steps is limited, to 1.
        steps: the step of the integers behind each output, `None` where it is float.
    """

    tolerance: float | None
    steps: tuple[float | None, ...] = ()

    def error(self, found: Difference, output: str) -> str | None:
        """Return what is wrong with a difference, or `None`."""
        if self.tolerance is None:
            # Integers may fall to the other side of a tie, and one such step may grow on its way to the output.
            if found.mean_steps is not None and not found.mean_steps <= 1:
                return f"more than one step of its integers on average. Received: {found.mean_steps:.3g} steps"
            return None
        if not found.excess <= self.tolerance:
            return f"more than the tolerance {self.tolerance:g}. Received: {found.excess:.3g} at output {output!r}"
        return None


@dataclass(frozen=True)
class Difference:
    """How far outputs are from their reference.

    Args:
        max_abs_diff: largest absolute difference of any value.
        max_rel_diff: largest difference as a fraction of the range (largest minus smallest value) of its
            output.
        excess: largest difference as a fraction of max(1, largest absolute value) of its output; what the
            tolerance limits.
        worst_output: index of the output with the largest `excess`.
        agreement: fraction of rows with the same argmax, the lowest of all outputs with classes; `None`
            without any.
        mean_steps: mean absolute difference in steps of the integers behind an output, the largest of all outputs
            that have them; `None` without any.
    """

    max_abs_diff: float
    max_rel_diff: float
    excess: float
    worst_output: int
    agreement: float | None
    mean_steps: float | None = None

    def merge(self, other: Difference) -> Difference:
        """Return the worse of both in each respect."""
        worse = max(self, other, key=lambda difference: difference.excess)
        agreements = [value for value in (self.agreement, other.agreement) if value is not None]
        steps = [value for value in (self.mean_steps, other.mean_steps) if value is not None]
        return Difference(
            max(self.max_abs_diff, other.max_abs_diff),
            max(self.max_rel_diff, other.max_rel_diff),
            worse.excess,
            worse.worst_output,
            min(agreements, default=None),
            max(steps, default=None),
        )


def compare_outputs(
    reference: list[np.ndarray], outputs: list[np.ndarray], steps: tuple[float | None, ...] = ()
) -> Difference:
    """Return how far `outputs` are from `reference`, both one array `(samples, ...)` per output.

    Args:
        reference: what is right.
        outputs: what is compared with it.
        steps: the step of the integers behind each output, `None` where it is float; empty for float outputs only.

    Raises:
        ExportError: they differ in number, in shape, or in where they are NaN or infinite.
    """
    if len(reference) != len(outputs):
        raise ExportError(f"expected {len(reference)} outputs. Received: {len(outputs)}")
    known = steps or (None,) * len(reference)
    parts = [_compare(i, *each) for i, each in enumerate(zip(reference, outputs, known, strict=True))]
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def _compare(index: int, reference: np.ndarray, output: np.ndarray, step: float | None) -> Difference:
    if reference.shape != output.shape:
        raise ExportError(f"output {index}: expected shape {reference.shape}. Received: {output.shape}")
    if reference.dtype.kind in "OSU":
        equal = float((reference.astype(str) == output.astype(str)).mean()) if reference.size else 1.0
        return Difference(1 - equal, 1 - equal, 1 - equal, index, None)
    expected, received = reference.astype("float64"), output.astype("float64")
    finite = np.isfinite(expected)
    if (
        not np.array_equal(expected[~finite], received[~finite], equal_nan=True)
        or not np.isfinite(received[finite]).all()
    ):
        raise ExportError(
            f"output {index}: expected {np.count_nonzero(~finite)} values that are NaN or infinite, as in "
            "Keras. "
            f"Received: {np.count_nonzero(~np.isfinite(received))}"
        )
    values = expected[finite]
    if values.size == 0:
        return Difference(0.0, 0.0, 0.0, index, None)
    largest = float(np.abs(values - received[finite]).max())
    spread = float(np.ptp(values))
    relative = largest / spread if spread else largest
    return Difference(
        largest,
        relative,
        largest / max(1.0, float(np.abs(values).max())),
        index,
        _agreement(expected, received),
        float(np.abs(values - received[finite]).mean() / step) if step else None,
    )


def _agreement(expected: np.ndarray, received: np.ndarray) -> float | None:
    if expected.ndim < 2 or expected.shape[-1] < 2 or not np.isfinite(expected).all():
        return None
    return float((expected.argmax(-1) == received.argmax(-1)).mean())


def check_parity(
    path: Path,
    name: str,
    samples: list[np.ndarray],
    references: dict[str, list[np.ndarray]],
    *,
    limit: Limit,
    folder: Path,
) -> tuple[Difference, dict[str, Any]]:
    """Run a file on samples in a child process and return the difference to Keras and what the runtime said.

    Args:
        path: the file.
        name: what messages call it.
        samples: one array `(n, ...)` per input.
        references: the outputs of Keras, `"together"` for all samples in one batch and `"single"` for the
            first ones, one by one; a file of batch 1 has only the second.
        limit: how far the outputs may be from those of Keras.
        folder: where arrays are exchanged with the child.

    Raises:
        ExportError: the outputs differ by more than the limit, or the runtime cannot run the file.
        WorkerError: the runtime crashed.
    """
    given, received = folder / f"{path.name}.inputs.npz", folder / f"{path.name}.outputs.npz"
    np.savez(given, **{f"input_{i}": _storable(array) for i, array in enumerate(samples)})
    counts = {kind: len(outputs[0]) for kind, outputs in references.items()}
    arguments = {"path": str(path), "inputs": str(given), "outputs": str(received), "counts": counts}
    try:
        facts = run_in_worker("compress.deploy.parity:run_file", arguments)
    except (ModelError, DataError) as error:  # the file is ours, so what is wrong with it is the export
        raise ExportError(f"the export to {name} cannot be run: {error.message.replace(str(path), name)}") from error
    except WorkerError as error:
        raise WorkerError(f"the export to {name} cannot be run: {error.message}", error.help) from error
    differences = []
    with np.load(received) as arrays:
        for kind, reference in references.items():
            outputs = [arrays[f"{kind}_{i}"] for i in range(len(facts["outputs"]))]
            try:
                differences.append(compare_outputs(reference, outputs, limit.steps))
            except ExportError as error:
                raise ExportError(f"{name} differs from the Keras model ({kind}): {error.message}") from error
    total = differences[0]
    for difference in differences[1:]:
        total = total.merge(difference)
    if problem := limit.error(total, facts["outputs"][total.worst_output]["name"]):
        agreement = "" if total.agreement is None else f", same class in {total.agreement:.1%} of the samples"
        raise ExportError(
            f"{name} differs from the Keras model by {problem} "
            f"(largest difference {total.max_abs_diff:.3g}{agreement})",
            "Run `bmcompress compare` on a file written with a larger tolerance to find the layer that differs; raise "
            "the tolerance only if the difference does no harm.",
        )
    return total, facts


def run_file(path: str, inputs: str, outputs: str, counts: dict[str, int]) -> dict[str, Any]:
    """Run a file on the arrays in `inputs`, write what it returns to `outputs` and say what ran it.

    Args:
        path: the model file.
        inputs: `.npz` with `input_0`, `input_1`, ... each `(n, ...)`.
        outputs: `.npz` to write, with `together_0`, ... and `single_0`, ...
        counts: how many samples to run `"together"` in one batch, and `"single"` one by one.
    """
    runtime = open_runtime(path)
    with np.load(inputs) as stored:
        samples = [stored[f"input_{i}"] for i in range(len(stored.files))]
    results = {}
    for kind, count in counts.items():
        size = count if kind == "together" else 1
        parts = [runtime.run([array[i : i + size] for array in samples]) for i in range(0, count, size)]
        for i, arrays in enumerate(zip(*parts, strict=True)):
            results[f"{kind}_{i}"] = _storable(np.concatenate(arrays))
    np.savez(outputs, **results)
    return {
        "runtime": runtime.name,
        "version": runtime.version,
        "batch": runtime.batch,
        "inputs": [info.model_dump() for info in runtime.inputs],
        "outputs": [info.model_dump() for info in runtime.outputs],
    }


def _storable(array: np.ndarray) -> np.ndarray:
    """Return strings as fixed-width text, which files can hold without pickle."""
    return array.astype(str) if array.dtype == object else array
