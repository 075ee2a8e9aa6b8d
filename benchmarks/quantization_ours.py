"""What bmcompress makes of the same trained nets, through its public API alone; the peers are in quantization_peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantization_nets import Arrays, Net, tuning_samples
from quantization_peers import BATCH_SIZE, calibration_samples


def ours_ptq(net: Net, arrays: Arrays, keras_file: Path, epochs: int, folder: Path) -> dict[str, Any]:
    """Quantize after training, and write the model and both files as `ours_ptq`; `_s8` has signed ONNX weights."""
    import compress
    from compress.data.split import Data, array_split

    model = compress.load_model(keras_file)
    data = Data(train=array_split("train", calibration_samples(arrays)))
    quantized = compress.PostTrainingQuantization(scheme="int8")(model, data)
    signed = {"onnx": folder / "ours_ptq_s8.onnx"}
    compress.export_models(quantized, signed, samples=arrays.x_train[:64], weight_type="int8")
    return export(quantized, arrays, folder, "ours_ptq")


def ours_qat(net: Net, arrays: Arrays, keras_file: Path, epochs: int, folder: Path) -> dict[str, Any]:
    """Quantize and train on, and write the model and both files as `ours_qat`."""
    import keras

    import compress
    from compress.data.split import Data, array_split

    keras.utils.set_random_seed(0)
    quantized = compress.fake_quantize(compress.load_model(keras_file), "int8")
    compress.calibrate(quantized, calibration_samples(arrays))
    x, y, epochs = tuning_samples(net, arrays, epochs)
    train = compress.QuantizationAwareTraining(epochs=epochs, batch_size=BATCH_SIZE, learning_rate=net.tuning_rate)
    return export(train(quantized, Data(train=array_split("train", x, y))), arrays, folder, "ours_qat")


def export(quantized: Any, arrays: Arrays, folder: Path, name: str) -> dict[str, Any]:
    """Write a fake-quantized model as `NAME.keras`, `NAME.tflite` and `NAME.onnx`."""
    import compress

    quantized.save(folder / f"{name}.keras")
    paths = {suffix: folder / f"{name}.{suffix}" for suffix in ("tflite", "onnx")}
    records = compress.export_models(quantized, paths, samples=arrays.x_train[:64])
    return {"notes": [note for record in records for note in record.notes]}


OURS = {function.__name__: function for function in (ours_ptq, ours_qat)}
"""Name -> function, as in `quantization_peers.TOOLS`."""
