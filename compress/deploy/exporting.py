"""Export of Keras models to TFLite and ONNX files that are known to compute the same.

The model is traced to a SavedModel here, converted in a child process, and each file is then run in its own
runtime and compared with Keras. A file appears at its path only when it has passed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import keras
import numpy as np

from compress.data.split import Arrays, Split
from compress.deploy.parity import Limit, check_parity
from compress.deploy.records import ExportRecord, Format, Io, Sparse, WeightType
from compress.deploy.runtimes import one_line
from compress.deploy.signature import ModelSignature, draw_samples, pack_inputs, read_signature, take_samples
from compress.deploy.tracing import SavedModel, computes_in_half, write_saved_model
from compress.errors import DataError, ExportError, SetupError, UsageError
from compress.files import atomic_path, sha256_of
from compress.models.copying import custom_objects_of
from compress.models.walking import find_all_layers
from compress.quantization.deployment import activation_bits, compute_of, is_fake_quantized
from compress.worker import Worker, run_in_worker

_SAMPLES = 64
_SINGLE_SAMPLES = 8
_OPSETS = range(13, 19)
_DYNAMIC, _WIDE = 0.1, 1e-2
_LARGEST_FILE = 2**31 - 2**20
_CHILD = {"CUDA_VISIBLE_DEVICES": "-1"}  # conversion needs no GPU, and must give the same bytes with and without one
_CONVERTERS = {"tflite": "compress.deploy.tflite_conversion", "onnx": "compress.deploy.onnx_conversion"}
_CONVERTER = {**_CHILD, "TF_USE_LEGACY_KERAS": "1"}  # keeps TensorFlow from importing Keras, a third of its start


def export_model(
    model: keras.Model,
    path: str | Path,
    *,
    format: Format | None = None,
    samples: Arrays | Split | None = None,
    opset: int = 17,
    io: Io = "float32",
    weight_type: WeightType = "uint8",
    tolerance: float | None = None,
    sparse: Sparse = "never",
) -> ExportRecord:
    """Write `model` as a TFLite or ONNX file that was run and found to agree with Keras, and return its
    record.

    Args:
        model: any built Keras model; it is not changed.
        path: the file to write; a file that is there stays until the new one has passed.
        format: `"tflite"` or `"onnx"`; `None` takes it from the suffix of `path`.
        samples: inputs to compare on, of which up to 64 are used; `None` draws random ones.
        opset: ONNX operator set, 13 to 18; files that need 21, as those with 4-bit weights, get 21.
        io: type of inputs and outputs of a model with quantized activations.
        weight_type: how ONNX files hold 8-bit weights: `"uint8"` is exact on every CPU, `"int8"` suits accelerators.
        tolerance: largest difference as a fraction of max(1, largest absolute output); `None` means 1e-4, and
            2e-2 for models that compute in half precision. Outputs of integer files may by default differ by one
            step of their integers on average.
        sparse: `"auto"`: a TFLite file stores pruned weights without their zeros where that makes it smaller; of
            fully connected layers only those in float. It loads more slowly, runs as fast, and compresses as before.

    Raises:
        ExportError: an operation has no equivalent, or the outputs differ from those of Keras.
        DataError: the samples do not fit the model.
        SetupError: the file cannot be written.
        WorkerError: a converter or runtime crashed.
    """
    chosen = format or Path(path).suffix.lower().removeprefix(".")
    options = {"samples": samples, "opset": opset, "io": io, "weight_type": weight_type, "tolerance": tolerance}
    return export_models(model, {chosen: path}, sparse=sparse, **options)[0]


def export_models(
    model: keras.Model,
    paths: Mapping[Format, str | Path],
    *,
    samples: Arrays | Split | None = None,
    opset: int = 17,
    io: Io = "float32",
    weight_type: WeightType = "uint8",
    tolerance: float | None = None,
    sparse: Sparse = "never",
) -> list[ExportRecord]:
    """Write `model` in several formats at once, as `export_model` does; none is written unless all have
    passed.

    Args:
        paths: format -> file to write.
    """
    targets = {name: Path(path) for name, path in paths.items()}
    _check_request(model, targets, opset, tolerance)
    if io != "float32" and not (is_fake_quantized(model) and compute_of(model) == "integer"):
        raise UsageError(
            f"expected io='float32' for a model whose activations are not quantized. Received: io={io!r}",
            "Quantize the model with the scheme int8 first.",
        )
    signature = read_signature(model, samples.head(1)[0] if isinstance(samples, Split) else samples)
    if samples is None:
        arrays, origin = draw_samples(signature, _SAMPLES, seed=0), "synthetic"
    else:
        arrays, origin = take_samples(signature, samples, _SAMPLES), "data"
    with tempfile.TemporaryDirectory(prefix="bmcompress-export-") as name:
        folder = Path(name)
        files = {file_format: folder / f"model.{file_format}" for file_format in targets}
        with Worker(preload=[_CONVERTERS[name] for name in targets], environment=_CONVERTER) as converter:
            # While the child imports TensorFlow, all is done here that does not need the files.
            saved = _trace(model, signature, folder, list(targets))
            limit = _limit(model, saved, tolerance)
            references = {"single": _keras_outputs(model, signature, [array[:_SINGLE_SAMPLES] for array in arrays], 1)}
            if any(batch is None for _, batch in saved.endpoints):
                references["together"] = _keras_outputs(model, signature, arrays, len(arrays[0]))
            results = _convert(converter, model, signature, saved, files, opset, io, weight_type)
        if sparse == "auto" and "tflite" in files:
            arguments = {"path": str(files["tflite"])}
            results["tflite"]["notes"] += run_in_worker("compress.deploy.tflite_sparse:encode_file", arguments)
        records = []
        for file_format, target in targets.items():
            batch = results[file_format]["batch"]
            expected = {kind: value for kind, value in references.items() if kind == "single" or batch is None}
            difference, facts = check_parity(
                files[file_format], str(target), arrays, expected, limit=limit, folder=folder
            )
            records.append(
                ExportRecord(
                    format=file_format,
                    path=target.name,
                    sha256=sha256_of(files[file_format]),
                    size_bytes=files[file_format].stat().st_size,
                    opset=results[file_format]["opset"],
                    inputs=facts["inputs"],
                    outputs=facts["outputs"],
                    batch="dynamic" if batch is None else batch,
                    samples=max(len(value[0]) for value in expected.values()),
                    samples_from=origin,
                    max_abs_diff=difference.max_abs_diff,
                    max_rel_diff=difference.max_rel_diff,
                    agreement=difference.agreement,
                    tolerance=limit.tolerance,
                    mean_steps=difference.mean_steps,
                    runtime=facts["runtime"],
                    runtime_version=facts["version"],
                    notes=(*results[file_format]["notes"], *_notes(model, origin)),
                )
            )
        with ExitStack() as stack:  # every copy is whole before the first takes its place
            for file_format, target in targets.items():
                shutil.copyfile(files[file_format], stack.enter_context(atomic_path(target)))
    return records


def _check_request(model: keras.Model, targets: dict[str, Path], opset: int, tolerance: float | None) -> None:
    known = get_args(Format)
    for file_format, target in targets.items():
        if file_format not in known:
            raise UsageError(
                f"expected a format out of {', '.join(known)}. Received: {file_format!r} for {target}",
                "Give the file the suffix .tflite or .onnx, or name the format.",
            )
        if not target.parent.is_dir() or target.is_dir():
            raise SetupError(f"{target} cannot be written. Received: a path whose folder does not exist, or a folder")
    if len({target.resolve() for target in targets.values()}) != len(targets):
        raise UsageError(f"expected one path for each format. Received: {', '.join(map(str, targets.values()))}")
    if opset not in _OPSETS:
        raise UsageError(f"expected an ONNX opset from {_OPSETS[0]} to {_OPSETS[-1]}. Received: opset={opset}")
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise UsageError(f"expected a tolerance of 0 or more. Received: tolerance={tolerance}")
    size_bytes = sum(4 * int(np.prod(weight.shape)) for weight in model.weights)
    if size_bytes > _LARGEST_FILE:
        raise ExportError(
            f"TFLite and ONNX files end at 2 GiB. Received: model {model.name!r} with {size_bytes} bytes of weights"
        )


def _limit(model: keras.Model, saved: SavedModel, tolerance: float | None) -> Limit:
    """Return how far a file may be from Keras."""
    if tolerance is not None:
        return Limit(tolerance, saved.output_steps)
    if saved.compute == "integer":
        # Kernels for 16 bits interpolate tables and round twice; a step is 1/256 of what it is in 8 bits.
        return Limit(_WIDE if activation_bits(model) == 16 else None, saved.output_steps)
    # Activations quantized at run time round differently in each runtime.
    return Limit(_DYNAMIC if saved.compute == "dynamic" else 2e-2 if computes_in_half(model) else 1e-4)


def _trace(model: keras.Model, signature: ModelSignature, folder: Path, formats: list[Format]) -> SavedModel:
    """Return the SavedModel of `model`; other backends hand a `.keras` file to a child on TensorFlow."""
    if keras.backend.backend() == "tensorflow":
        return write_saved_model(model, signature, folder / "saved_model", formats)
    source = folder / "model.keras"
    model.save(source)
    modules = sorted({item.__module__ for item in custom_objects_of(model).values()} - {"__main__"})
    arguments = {
        "source": str(source),
        "folder": str(folder / "saved_model"),
        "formats": formats,
        "modules": modules,
    }
    environment = {**_CHILD, "KERAS_BACKEND": "tensorflow"}
    found = run_in_worker("compress.deploy.tracing:trace_file", arguments, environment=environment)
    return SavedModel(
        Path(found["folder"]),
        [tuple(endpoint) for endpoint in found["endpoints"]],
        found["outputs"],
        found["compute"],
        tuple(found["output_steps"]),
    )


def _convert(
    converter: Worker,
    model: keras.Model,
    signature: ModelSignature,
    saved: SavedModel,
    files: dict[str, Path],
    opset: int,
    io: Io,
    weight_type: WeightType,
) -> dict[str, Any]:
    arguments = {
        "quantization": saved.compute
        and {"weights": str(saved.weights), "compute": saved.compute, "io": io, "weight_type": weight_type},
        "folder": str(saved.folder),
        "endpoints": saved.endpoints,
        "inputs": [info.name for info in signature.inputs],
        "outputs": saved.outputs,
        "layers": sorted({layer.name for layer in find_all_layers(model)}),
        "model": model.name,
        "files": {file_format: str(path) for file_format, path in files.items()},
        "opset": opset,
    }
    return converter.run("compress.deploy.conversion:convert", arguments)


def _keras_outputs(
    model: keras.Model, signature: ModelSignature, arrays: list[np.ndarray], size: int
) -> list[np.ndarray]:
    """Return the outputs of Keras for batches of `size` samples, computed on the CPU as the files are."""
    parts = []
    with keras.device("cpu"):
        for start in range(0, len(arrays[0]), size):
            batch = [keras.ops.convert_to_tensor(array[start : start + size]) for array in arrays]
            outputs = _call(model, pack_inputs(signature, batch))
            parts.append([_plain(keras.ops.convert_to_numpy(output)) for output in outputs])
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def _call(model: keras.Model, inputs: Any) -> list[Any]:
    try:
        return keras.tree.flatten(model(inputs, training=False))
    except Exception as error:  # user code runs here
        raise DataError(
            f"model {model.name!r} cannot run on the samples in Keras. Received: {type(error).__name__}: "
            f"{one_line(error)}",
            "Pass samples that the model was made for.",
        ) from error


def _plain(array: np.ndarray) -> np.ndarray:
    return array.astype("float32") if array.dtype.name in ("float16", "bfloat16") else array


def _notes(model: keras.Model, origin: str) -> list[str]:
    notes = []
    if origin == "synthetic":
        notes.append("Compared with Keras on random inputs, because no data was given.")
    if computes_in_half(model):
        notes.append("The file computes in float32; in Keras the model computes in half precision.")
    return notes
