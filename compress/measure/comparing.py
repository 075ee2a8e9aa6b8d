"""Comparing two model files: the error of each layer, the layer where they part, and the decisions that change.

Both files run in one child process, since a runtime may crash on a file, and layers are compared batch by batch.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress import __version__
from compress.data.split import Arrays, Split, as_split
from compress.deploy.runtimes import detect_format, plain_name
from compress.errors import UsageError
from compress.files import sha256_of
from compress.measure.children import read_outputs
from compress.measure.comparison import ComparedFile, Comparison, LayerError, OutputComparison, Parting
from compress.measure.flips import compare_decisions
from compress.measure.inputs import write_inputs
from compress.measure.results import SplitSummary, Tool
from compress.worker import run_in_worker

FLOAT_SQNR_DB, QUANTIZED_SQNR_DB = 30.0, 10.0
"""Where two files part by default. Between float files, rounding leaves 60 dB in float16 and 45 in bfloat16. In
quantized ones errors add up from layer to layer, to 15 or 20 dB in deep networks; at 10 dB a tenth is noise."""

_FLOAT_CLEAN_DB, _QUANTIZED_CLEAN_DB = 120.0, 40.0
"""What counts as no error when drops are measured: rounding to float32, or one rounding to 8 bits."""
_LOWEST_DB = -20.0
_SMALLEST_DROP_DB = 3.0
_RANDOM_SAMPLES = 256


def compare_models(
    a: str | Path,
    b: str | Path,
    data: Any = None,
    samples: int = 64,
    *,
    sqnr_db: float | None = None,
    seed: int = 0,
    allow_imports: Sequence[str] = (),
) -> Comparison:
    """Return how far the model file `b` is from `a`: layer by layer, and in what both say over `data`.

    Args:
        a: the file that counts as right, `.keras`, `.tflite` or `.onnx`, float or quantized.
        b: the other file, of any of these formats; it takes the same inputs.
        data: a split, `(x, y)`, `x` or a stream of batches; `None` draws random inputs, which says little about
            agreement. Labels tell whether decisions change for better or worse.
        samples: how many of them the errors of layers are measured on; decisions are compared on all.
        sqnr_db: signal-to-noise ratio below which a layer counts as parted; `None` means 10 where one of the files is
            quantized and 30 between float files.
        seed: of random inputs.
        allow_imports: packages whose classes a `.keras` file may name.

    Raises:
        UsageError: `samples` or `sqnr_db` make no sense.
        ModelError: a file is missing, damaged or unsafe, or the files take different inputs.
        DataError: the samples do not fit the files.
        WorkerError: a file crashed its runtime.
    """
    if samples < 1:
        raise UsageError(f"samples must be 1 or more. Received: samples={samples}")
    if sqnr_db is not None and not math.isfinite(sqnr_db):
        raise UsageError(f"sqnr_db must be a number of dB. Received: sqnr_db={sqnr_db}")
    files = [str(a), str(b)]
    formats = [detect_format(Path(file)) for file in files]
    split = None if data is None else as_split("test", data)
    with tempfile.TemporaryDirectory(prefix="bmcompress-compare-") as folder:
        x, y = (None, None) if split is None else split.all()
        if split is not None:
            write_inputs(Path(folder) / "inputs", x)
        arguments = {
            "a": files[0],
            "b": files[1],
            "folder": folder,
            "samples": samples,
            "random_samples": 0 if split is not None else max(samples, _RANDOM_SAMPLES),
            "seed": seed,
            "allow_imports": list(allow_imports),
        }
        # Files run on the CPU, and so does Keras: another device would round in another way.
        facts = run_in_worker(
            "compress.measure.layer_comparison:compare_files",
            arguments,
            description="compare",
            environment={"CUDA_VISIBLE_DEVICES": "-1"},
        )
        outputs, notes = _compare_outputs(facts["outputs"], folder, y)
    quantized = facts["quantized"]
    threshold = sqnr_db if sqnr_db is not None else QUANTIZED_SQNR_DB if any(quantized) else FLOAT_SQNR_DB
    layers, first, largest = judge_layers(facts["layers"], any(quantized), threshold)
    return Comparison(
        tool=Tool(version=__version__),
        a=_describe_file(files[0], formats[0], quantized[0]),
        b=_describe_file(files[1], formats[1], quantized[1]),
        data=None if split is None else _summarize(split, x, y),
        layer_samples=facts["samples"],
        sqnr_threshold_db=threshold,
        layers=layers,
        first_parting=first,
        largest_drop=largest,
        outputs=outputs,
        notes=[*facts["notes"], *notes],
        reasons={} if split is not None else {"data": "none was given"},
    )


def _describe_file(file: str, file_format: str, quantized: bool) -> ComparedFile:
    size = Path(file).stat().st_size
    return ComparedFile(file=file, format=file_format, sha256=sha256_of(file), file_bytes=size, quantized=quantized)


def _summarize(split: Split, x: Arrays, y: Arrays) -> SplitSummary:
    samples = len(Split(split.name, x))
    return SplitSummary(name=split.name, samples=samples, labelled=y is not None, digest=split.digest)


def _compare_outputs(names: list[list[str]], folder: str, y: Arrays) -> tuple[list[OutputComparison], list[str]]:
    """Return what both files say through their outputs, or the reason why that cannot be told."""
    given_a, given_b = (read_outputs(Path(folder) / f"{side}.npz") for side in "ab")
    paired = _pair_outputs(names, given_a, given_b)
    if paired is None:
        shapes = [", ".join(str(array.shape[1:]) for array in given) for given in (given_a, given_b)]
        return [], [f"the outputs cannot be compared: the files give {shapes[0]} and {shapes[1]} per sample"]
    return compare_decisions(names[0], given_a, paired, y), []


def _pair_outputs(names: list[list[str]], a: list[np.ndarray], b: list[np.ndarray]) -> list[np.ndarray] | None:
    """Return the outputs `b` in the order of `a`: by name, or else those of one size whose values are closest."""
    plain_a, plain_b = ([plain_name(name) for name in each] for each in names)
    if set(plain_a) == set(plain_b) and len(plain_a) == len(plain_b) == len(set(plain_a)):
        found = [b[plain_b.index(name)] for name in plain_a]
    else:
        found, left = [], list(range(len(b)))
        for array in a:
            fitting = [j for j in left if b[j].size == array.size]
            if not fitting:
                return None
            best = min(fitting, key=lambda j, array=array: _distance(array, b[j]))
            left.remove(best)
            found.append(b[best])
    return found if len(a) == len(b) and all(p.size == q.size for p, q in zip(a, found, strict=True)) else None


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    difference = np.nan_to_num(a.reshape(-1).astype("float64") - b.reshape(-1))
    return float(difference @ difference)


def judge_layers(
    facts: list[dict[str, Any]], quantized: bool, threshold_db: float
) -> tuple[list[LayerError], Parting | None, Parting | None]:
    """Return the error of each layer, the first one below the threshold, and the one that loses most.

    Args:
        facts: what `compare_files` found of each layer, in the order of execution.
        quantized: whether one of the files is.
        threshold_db: signal-to-noise ratio below which a layer has parted.
    """
    layers, levels, drops = _describe_layers(facts, _QUANTIZED_CLEAN_DB if quantized else _FLOAT_CLEAN_DB)
    return layers, *_find_parting(facts, layers, levels, drops, threshold_db)


def _describe_layers(facts: list[dict], clean_db: float) -> tuple[list[LayerError], list[float], list[float]]:
    """Return each layer's error, its level in dB, and how far that is below its inputs."""
    layers, levels, drops = [], [], []
    for fact in facts:
        level = _level(fact, clean_db)
        levels.append(level)
        drops.append(min([levels[parent] for parent in fact["inputs"]], default=clean_db) - level)
        missing = fact["counterpart"] is None
        reasons = {"counterpart": fact["reason"]} if missing else {}
        if not missing and fact["sqnr_db"] is None:
            reasons["sqnr_db"] = fact["reason"]
        layers.append(
            LayerError(
                layer=fact["layer"],
                kind=fact["kind"],
                counterpart=fact["counterpart"],
                shape=tuple(fact["shape"]),
                mse=fact["mse"],
                sqnr_db=fact["sqnr_db"],
                cosine=fact["cosine"],
                drop_db=None if missing else drops[-1],
                reasons=reasons,
            )
        )
    return layers, levels, drops


def _level(fact: dict, clean_db: float) -> float:
    if fact["counterpart"] is None or fact["mse"] == 0:
        return clean_db
    return _LOWEST_DB if fact["sqnr_db"] is None else max(_LOWEST_DB, min(clean_db, fact["sqnr_db"]))


def _find_parting(
    facts: list[dict], layers: list[LayerError], levels: list[float], drops: list[float], threshold: float
) -> tuple[Parting | None, Parting | None]:
    compared = [index for index, layer in enumerate(layers) if layer.counterpart is not None]
    first = next((index for index in compared if levels[index] < threshold), None)
    largest = max(
        (index for index in compared if drops[index] >= _SMALLEST_DROP_DB), key=drops.__getitem__, default=None
    )

    def describe(index: int | None) -> Parting | None:
        if index is None:
            return None
        suspects = [layers[each].layer for each in facts[index]["between"]]
        return Parting(
            layer=layers[index].layer, sqnr_db=layers[index].sqnr_db, drop_db=drops[index], suspects=suspects
        )

    return describe(first), describe(largest)
