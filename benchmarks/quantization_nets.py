"""The trained float nets that the quantization benchmarks start from, with their data.

ResNet8 and MobileNetV1-0.25 follow MLPerf Tiny (Banbury 2021, arXiv:2106.07597), the Transformer has the positional
convolution of Chu 2021 (arXiv:2102.10882). Builders take the Keras module, so the same net can be built in tf_keras.

    python benchmarks/quantization_nets.py --data DATA --work WORK
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent.parent))

SAMPLE_RATE, FRAME, HOP, BANDS = 8000, 256, 128, 40


@dataclass(frozen=True)
class Net:
    """One net of the benchmark: how it is built and trained, and on what."""

    name: str
    data: str
    """Stem of the `.npz` file."""
    build: Callable[[Any, tuple[int, ...]], Any]
    """Takes the Keras module and the shape of a sample, and returns the model."""
    epochs: int
    learning_rate: float = 3e-3
    batch_size: int = 64
    augment: bool = False
    """Whether images are flipped and shifted at random."""
    tuning_rate: float = 3e-4
    """Learning rate at the start of QAT, for every tool."""


@dataclass(frozen=True)
class Arrays:
    """Samples and labels: float32 `(n, ...)` and int64 `(n,)`."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def _conv_norm(k: Any, x: Any, filters: int, size: int, strides: int = 1, relu: bool = True) -> Any:
    x = k.layers.Conv2D(filters, size, strides=strides, padding="same", use_bias=False)(x)
    x = k.layers.BatchNormalization(momentum=0.9)(x)
    return k.layers.ReLU()(x) if relu else x


def build_resnet8(k: Any, shape: tuple[int, ...], width: int = 16, stem_strides: int = 1) -> Any:
    """Return the residual net: three stages of 1, 2 and 4 times `width` filters, 78 thousand parameters for 16."""
    inputs = k.Input(shape)
    x = _conv_norm(k, inputs, width, 3, stem_strides)
    for filters, strides in ((width, 1), (2 * width, 2), (4 * width, 2)):
        y = _conv_norm(k, x, filters, 3, strides)
        y = _conv_norm(k, y, filters, 3, relu=False)
        if strides > 1:
            x = k.layers.Conv2D(filters, 1, strides=strides, padding="same")(x)
        x = k.layers.ReLU()(k.layers.Add()([x, y]))
    x = k.layers.GlobalAveragePooling2D()(x)
    return k.Model(inputs, k.layers.Dense(10, activation="softmax")(x))


def build_mobilenet(k: Any, shape: tuple[int, ...]) -> Any:
    """Return MobileNetV1 of width 0.25 for small images: 13 depthwise blocks, 221 thousand parameters."""
    inputs = k.Input(shape)
    x = _conv_norm(k, inputs, 8, 3)
    blocks = [(16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), *[(128, 1)] * 5, (256, 2), (256, 1)]
    for filters, strides in blocks:
        x = k.layers.DepthwiseConv2D(3, strides=strides, padding="same", use_bias=False)(x)
        x = k.layers.ReLU()(k.layers.BatchNormalization(momentum=0.9)(x))
        x = _conv_norm(k, x, filters, 1)
    x = k.layers.GlobalAveragePooling2D()(x)
    return k.Model(inputs, k.layers.Dense(10, activation="softmax")(x))


def build_transformer(k: Any, shape: tuple[int, ...]) -> Any:
    """Return a pre-norm Transformer of three blocks on 4x4 patches, 64 features wide, 103 thousand parameters."""
    width, heads = 64, 4
    inputs = k.Input(shape)
    x = k.layers.Conv2D(width, 4, strides=4)(inputs)
    x = k.layers.Add()([x, k.layers.DepthwiseConv2D(3, padding="same")(x)])
    x = k.layers.Reshape((shape[0] // 4 * (shape[1] // 4), width))(x)
    for _ in range(3):
        y = k.layers.LayerNormalization(epsilon=1e-5)(x)
        x = k.layers.Add()([x, k.layers.MultiHeadAttention(heads, width // heads)(y, y)])
        y = k.layers.LayerNormalization(epsilon=1e-5)(x)
        y = k.layers.Dense(2 * width, activation="gelu")(y)
        x = k.layers.Add()([x, k.layers.Dense(width)(y)])
    x = k.layers.GlobalAveragePooling1D()(k.layers.LayerNormalization(epsilon=1e-5)(x))
    return k.Model(inputs, k.layers.Dense(10, activation="softmax")(x))


def build_conv1d(k: Any, shape: tuple[int, ...]) -> Any:
    """Return three 1-D convolutions over frames, 47 thousand parameters."""
    inputs = x = k.Input(shape)
    for filters in (48, 64, 64):
        x = k.layers.Conv1D(filters, 5, padding="same", use_bias=False)(x)
        x = k.layers.ReLU()(k.layers.BatchNormalization(momentum=0.9)(x))
        x = k.layers.MaxPooling1D(2)(x)
    x = k.layers.Dropout(0.3)(k.layers.GlobalAveragePooling1D()(x))
    return k.Model(inputs, k.layers.Dense(10, activation="softmax")(x))


def build_lstm(k: Any, shape: tuple[int, ...]) -> Any:
    """Return an LSTM of 64 units whose outputs are averaged over frames, 28 thousand parameters."""
    inputs = k.Input(shape)
    x = k.layers.LSTM(64, return_sequences=True)(k.layers.Dropout(0.2)(inputs))
    x = k.layers.Dropout(0.4)(k.layers.GlobalAveragePooling1D()(x))
    return k.Model(inputs, k.layers.Dense(10, activation="softmax")(x))


NETS = {
    net.name: net
    for net in (
        Net("fashion_resnet8", "fashion_mnist", build_resnet8, epochs=5),
        Net("cifar_resnet8", "cifar10", build_resnet8, epochs=20, augment=True),
        Net("fashion_mobilenet", "fashion_mnist", build_mobilenet, epochs=6),
        Net("cifar_mobilenet", "cifar10", build_mobilenet, epochs=28, augment=True),
        Net("fashion_transformer", "fashion_mnist", build_transformer, epochs=12, learning_rate=1.5e-3),
        Net("digits_conv1d", "fsdd", build_conv1d, epochs=30, batch_size=32),
        Net("digits_lstm", "fsdd", build_lstm, epochs=30, batch_size=32),
    )
}


def load_arrays(net: Net, folder: Path) -> Arrays:
    """Return the samples of `net` from `folder/NAME.npz`: images in [0, 1], sound as log-mel frames."""
    with np.load(folder / f"{net.data}.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in ("x_train", "y_train", "x_test", "y_test")}
        if net.data == "fsdd":
            arrays = _split_by_speaker(arrays, np.concatenate([file["spk_train"], file["spk_test"]]))
    for name in ("x_train", "x_test"):
        x = arrays[name]
        if net.data == "fsdd":
            arrays[name] = log_mel_frames(x)
        else:
            arrays[name] = (x if x.ndim == 4 else x[..., None]).astype(np.float32) / np.float32(255)
    for name in ("y_train", "y_test"):
        arrays[name] = arrays[name].astype(np.int64).reshape(-1)
    return Arrays(**arrays)


def _split_by_speaker(arrays: dict[str, np.ndarray], speakers: np.ndarray) -> dict[str, np.ndarray]:
    """Return another split of the recordings: the last two of six speakers are for testing.

    The split of the file has the same speakers on both sides, and the nets make no mistake on it.
    """
    x, y = (np.concatenate([arrays[f"{name}_train"], arrays[f"{name}_test"]]) for name in "xy")
    unheard = np.isin(speakers, np.unique(speakers)[-2:])
    return {"x_train": x[~unheard], "y_train": y[~unheard], "x_test": x[unheard], "y_test": y[unheard]}


def log_mel_frames(sound: np.ndarray) -> np.ndarray:
    """Return float32 log-mel frames `(n, 61, 40)`, each sample with mean 0 and deviation 1, of 16-bit `sound`."""
    starts = np.arange(0, sound.shape[1] - FRAME + 1, HOP)
    window = np.hanning(FRAME).astype(np.float32)
    filters = _mel_filters()
    frames = []
    for part in np.array_split(sound, max(1, len(sound) // 200)):  # a spectrum of all at once takes gigabytes
        cut = part[:, starts[:, None] + np.arange(FRAME)].astype(np.float32) / 32768
        power = np.abs(np.fft.rfft(cut * window)) ** 2
        frames.append(np.log(power @ filters + 1e-6))
    x = np.concatenate(frames)
    x = (x - x.mean((1, 2), keepdims=True)) / (x.std((1, 2), keepdims=True) + 1e-3)
    return x.astype(np.float32)


def _mel_filters() -> np.ndarray:
    """Return triangular filters `(FRAME // 2 + 1, BANDS)` at equal distances on the mel scale."""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)
    bins = np.linspace(0, SAMPLE_RATE / 2, FRAME // 2 + 1)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    return np.clip(np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)), 0, None)


def augment_images(x: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return images mirrored half of the time and shifted by up to 4 pixels, borders filled with zeros."""
    n, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
    rows, columns = random.integers(0, 9, (2, n))
    rows = rows[:, None, None] + np.arange(height)[None, :, None]
    places = np.where(random.random(n)[:, None] < 0.5, np.arange(width)[::-1], np.arange(width))
    columns = columns[:, None, None] + places[:, None, :]
    return padded[np.arange(n)[:, None, None], rows, columns]


def tuning_samples(net: Net, arrays: Arrays, epochs: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return samples, labels and epochs of QAT; each epoch's own random images, where images are augmented."""
    if not net.augment:
        return arrays.x_train, arrays.y_train, epochs
    random = np.random.default_rng(1)
    x = np.concatenate([augment_images(arrays.x_train, random) for _ in range(epochs)])
    return x, np.tile(arrays.y_train, epochs), 1


def train_net(net: Net, arrays: Arrays, *, epochs: int | None = None, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """Return the trained Keras 3 model and facts: test accuracy in percent, seconds, parameters."""
    import keras

    keras.utils.set_random_seed(seed)
    random = np.random.default_rng(seed)
    epochs = epochs or net.epochs
    model = net.build(keras, arrays.x_train.shape[1:])
    steps = -(-len(arrays.x_train) // net.batch_size) * epochs
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=net.learning_rate, warmup_steps=max(1, steps // 20)
    )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=1e-2)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    start = time.perf_counter(), time.process_time()
    for epoch in range(epochs):
        x = augment_images(arrays.x_train, random) if net.augment else arrays.x_train
        history = model.fit(
            x, arrays.y_train, batch_size=net.batch_size, initial_epoch=epoch, epochs=epoch + 1, verbose=0
        )
        loss = history.history["loss"][-1]
        print(f"{net.name}: epoch {epoch + 1}: loss {loss:.4f}, {time.perf_counter() - start[0]:.0f} s", flush=True)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    accuracy = 100 * float(np.mean(model.predict(arrays.x_test, verbose=0).argmax(-1) == arrays.y_test))
    return model, {
        "net": net.name,
        "parameters": model.count_params(),
        "accuracy_percent": round(accuracy, 2),
        "epochs": epochs,
        "seed": seed,
        "wall_seconds": round(seconds[0], 1),
        "cpu_seconds": round(seconds[1], 1),
    }


def ensure_net(net: Net, arrays: Arrays, work: Path, *, epochs: int | None = None) -> tuple[Path, dict[str, Any]]:
    """Return the `.keras` file of the trained net in `work`, trained now if it is not there, and facts about it."""
    path, facts_path = work / f"{net.name}.keras", work / f"{net.name}.json"
    if not (path.exists() and facts_path.exists()):
        work.mkdir(parents=True, exist_ok=True)
        model, facts = train_net(net, arrays, epochs=epochs)
        model.save(path)
        facts_path.write_text(json.dumps(facts, indent=2) + "\n")
    return path, json.loads(facts_path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with fashion_mnist, cifar10 and fsdd .npz")
    parser.add_argument("--work", type=Path, required=True, help="folder of the trained nets")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--epochs", type=int, help="instead of each net's own")
    parser.add_argument("--threads", type=int, default=1, help="TensorFlow threads (default: 1)")
    arguments = parser.parse_args()
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)
    tf.config.threading.set_inter_op_parallelism_threads(arguments.threads)
    for name in arguments.nets:
        arrays = load_arrays(NETS[name], arguments.data)
        print(ensure_net(NETS[name], arrays, arguments.work, epochs=arguments.epochs)[1], flush=True)


if __name__ == "__main__":
    main()
