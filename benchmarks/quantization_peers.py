"""What other tools make of the same trained nets: int8 files from their documented defaults, each in its own process.

TFLiteConverter, ai-edge-quantizer (optional; `pip install "ai-edge-quantizer>=0.10,<0.11"`), onnxruntime.quantization,
and tfmot's QAT on the net rebuilt in tf_keras with the same weights. All see the same calibration samples, and QAT the
same samples, epochs, optimizer and learning rate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from quantization_nets import Arrays, Net, tuning_samples

CALIBRATION_SAMPLES = 512
BATCH_SIZE = 64


def calibration_samples(arrays: Arrays, count: int = CALIBRATION_SAMPLES) -> np.ndarray:
    """Return the training samples that every tool calibrates on: `count` drawn without replacement."""
    order = np.random.default_rng(0).permutation(len(arrays.x_train))
    return arrays.x_train[np.sort(order[:count])]


def float_files(net: Net, arrays: Arrays, keras_file: Path, epochs: int, folder: Path) -> dict[str, Any]:
    """Write the float model as `float.tflite` and `float.onnx`, which some tools start from."""
    import keras

    import compress

    model = keras.saving.load_model(keras_file, compile=False)
    paths = {"tflite": folder / "float.tflite", "onnx": folder / "float.onnx"}
    compress.export_models(model, paths, samples=arrays.x_train[:64])
    return {}


def tuned_float(net: Net, arrays: Arrays, keras_file: Path, epochs: int, folder: Path) -> dict[str, Any]:
    """Write the float model after the training that QAT gets: what of QAT's gain is more training alone."""
    import keras

    import compress

    keras.utils.set_random_seed(0)
    model = keras.saving.load_model(keras_file, compile=False)
    fit(keras, model, net, arrays, epochs)
    paths = {"tflite": folder / "float_tuned.tflite", "onnx": folder / "float_tuned.onnx"}
    compress.export_models(model, paths, samples=arrays.x_train[:64])
    return {}


def fit(k: Any, model: Any, net: Net, arrays: Arrays, epochs: int) -> None:
    """Train a model of Keras or tf_keras as every QAT here is trained: Adam along half a cosine to 0."""
    x, y, epochs = tuning_samples(net, arrays, epochs)
    steps = -(-len(x) // BATCH_SIZE) * epochs
    rate = k.optimizers.schedules.CosineDecay(net.tuning_rate, steps)
    model.compile(k.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=BATCH_SIZE, epochs=epochs, verbose=0)


def tflite_converter(net: Net, arrays: Arrays, keras_file: Path, epochs: int, folder: Path) -> dict[str, Any]:
    """Quantize with TFLiteConverter: full integer with a representative dataset, float inputs and outputs."""
    samples = calibration_samples(arrays)
    content, notes = _convert(keras_file, samples)
    (folder / "tflite_converter.tflite").write_bytes(content)
    return {"notes": notes}


def tflite_dynamic(net: Net, arrays: Arrays, keras_file: Path, epochs: int, folder: Path) -> dict[str, Any]:
    """Quantize weights with TFLiteConverter; its runtime quantizes activations as it goes (dynamic range)."""
    content, notes = _convert(keras_file, None)
    (folder / "tflite_dynamic.tflite").write_bytes(content)
    return {"notes": notes}


def _convert(keras_file: Path, samples: np.ndarray | None) -> tuple[bytes, list[str]]:
    import keras
    import tensorflow as tf

    model = keras.saving.load_model(keras_file, compile=False)

    def convert(batch: int | None) -> bytes:
        with tempfile.TemporaryDirectory() as saved:
            write_saved_model(keras, model, model.input_shape[1:], batch, saved)
            converter = tf.lite.TFLiteConverter.from_saved_model(saved)
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            if samples is not None:
                converter.representative_dataset = lambda: ([sample[None]] for sample in samples)
            return converter.convert()

    try:
        return convert(None), []
    except Exception as error:  # the converter raises many types; a fixed batch may help
        return convert(1), [f"any batch size: {str(error).splitlines()[0][:200]}; converted for batch 1"]


def write_saved_model(k: Any, model: Any, shape: tuple[int, ...], batch: int | None, folder: str) -> None:
    """Write a SavedModel with one entry point for `batch` samples of `shape` (`None`: any number)."""
    import tensorflow as tf

    archive = k.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint(
        "serve", lambda x: model(x, training=False), input_signature=[tf.TensorSpec((batch, *shape), tf.float32)]
    )
    archive.write_out(folder, verbose=False)


def ai_edge_quantizer(net: Net, arrays: Arrays, keras_file: Path, epochs: int, folder: Path) -> dict[str, Any]:
    """Quantize `float.tflite` with ai-edge-quantizer's static 8-bit recipe, inputs and outputs left in float."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import qtyping, quantizer, recipe

    source = folder / "float.tflite"
    interpreter = Interpreter(str(source))
    ((key, signature),) = interpreter.get_signature_list().items()
    (name,) = signature["inputs"]
    tool = quantizer.Quantizer(str(source))
    tool.load_quantization_recipe(recipe.static_wi8_ai8())
    for operation in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        tool.update_quantization_recipe(".*", operation, algorithm_key="no_quantize")
    found = tool.calibrate({key: [{name: sample[None]} for sample in calibration_samples(arrays)]}, num_threads=1)
    tool.quantize(found).export_model(str(folder / "ai_edge_quantizer.tflite"), overwrite=True)
    return {}


def onnxruntime_static(net: Net, arrays: Arrays, keras_file: Path, epochs: int, folder: Path) -> dict[str, Any]:
    """Quantize `float.onnx` with `quantize_static` (QDQ): at its defaults, and per channel with other types."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self, name: str, batches: Iterator[np.ndarray]):
            self._feeds = ({name: batch} for batch in batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    import onnx

    source = onnx.load(folder / "float.onnx")
    (info,) = source.graph.input
    fixed = info.type.tensor_type.shape.dim[0].dim_value
    samples = calibration_samples(arrays)
    unsigned, signed = QuantType.QUInt8, QuantType.QInt8
    notes = []
    with tempfile.TemporaryDirectory() as name:
        prepared = Path(name) / "prepared.onnx"
        try:
            quant_pre_process(str(folder / "float.onnx"), str(prepared))
        except Exception as error:  # symbolic shape inference knows fewer operators than the runtime
            notes.append(f"quant_pre_process: {str(error).splitlines()[0][:200]}; symbolic shapes skipped")
            quant_pre_process(str(folder / "float.onnx"), str(prepared), skip_symbolic_shape=True)
        for variant, options in {
            "default": {},
            "u8s8": {"per_channel": True, "activation_type": unsigned, "weight_type": signed},
            "u8u8": {"per_channel": True, "activation_type": unsigned, "weight_type": unsigned},
        }.items():
            step = fixed or BATCH_SIZE
            reader = Reader(info.name, (samples[start : start + step] for start in range(0, len(samples), step)))
            quantize_static(str(prepared), str(folder / f"onnxruntime_{variant}.onnx"), reader, **options)
    return {"notes": notes}


def tfmot_qat(net: Net, arrays: Arrays, keras_file: Path, epochs: int, folder: Path) -> dict[str, Any]:
    """Train with tfmot's QAT in tf_keras from the same weights, and convert as its guide does."""
    import keras
    import tensorflow as tf
    import tensorflow_model_optimization as tfmot
    import tf_keras

    trained = keras.saving.load_model(keras_file, compile=False)
    tf_keras.utils.set_random_seed(0)
    model = net.build(tf_keras, arrays.x_train.shape[1:])
    copy_weights(trained, model)
    expected, received = (np.asarray(m(arrays.x_test[:64])) for m in (trained, model))
    if not np.allclose(expected, received, atol=1e-4):
        raise RuntimeError(f"the net in tf_keras differs by {np.abs(expected - received).max()}")
    api, notes = tfmot.quantization.keras, []
    try:
        quantized = api.quantize_model(model)
    except Exception as error:  # it refuses whole models for one layer
        notes.append(f"quantize_model refuses: {str(error).splitlines()[0][:200]}")
        quantized = annotate_known(tfmot, tf_keras, model)
        notes.append("only the layers that its registry knows were quantized")
    fit(tf_keras, quantized, net, arrays, epochs)
    converter = tf.lite.TFLiteConverter.from_keras_model(quantized)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    try:
        content = converter.convert()
    except Exception as error:  # the converter raises many types; a fixed batch may help
        notes.append(f"any batch size: {str(error).splitlines()[0][:200]}; converted for batch 1")
        spec = tf.TensorSpec((1, *arrays.x_train.shape[1:]), tf.float32)
        function = tf.function(lambda x: quantized(x, training=False)).get_concrete_function(spec)
        converter = tf.lite.TFLiteConverter.from_concrete_functions([function], quantized)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        content = converter.convert()
    (folder / "tfmot_qat.tflite").write_bytes(content)
    return {"notes": notes}


def copy_weights(source: Any, target: Any) -> None:
    """Copy weights layer by layer from a Keras 3 model to the same net in tf_keras; names may differ."""
    owners = [[layer for layer in model.layers if layer.get_weights()] for model in (source, target)]
    for old, new in zip(*owners, strict=True):
        new.set_weights([np.asarray(value) for value in old.get_weights()])


def annotate_known(tfmot: Any, tf_keras: Any, model: Any) -> Any:
    """Return the model with the layers that tfmot's default registry supports made quantized."""
    api = tfmot.quantization.keras
    registry = api.default_8bit.Default8BitQuantizeRegistry()

    def mark(layer: Any) -> Any:
        return api.quantize_annotate_layer(layer) if registry.supports(layer) else layer

    return api.quantize_apply(tf_keras.models.clone_model(model, clone_function=mark))


TOOLS = {
    function.__name__: function
    for function in (
        float_files,
        tuned_float,
        tflite_converter,
        tflite_dynamic,
        ai_edge_quantizer,
        onnxruntime_static,
        tfmot_qat,
    )
}
"""Name -> function `(net, arrays, keras_file, epochs, folder) -> facts`, which writes its files to `folder`."""
