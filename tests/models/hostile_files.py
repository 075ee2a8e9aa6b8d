"""Model files made by hand, good and hostile: generators, so that no binary is kept.

Payloads only create a marker file.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import marshal
import pickle
import stat
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Config = dict[str, Any]
FOREIGN_BYTES = b"SECRET-BYTES-" * 100


def keras_object(class_name: str, config: Any, module: str | None = "keras.layers", **extra: Any) -> Config:
    """Return an object as Keras serialises it."""
    return {"module": module, "class_name": class_name, "config": config, "registered_name": None, **extra}


def dense(name: str, units: int, inputs: int, **options: Any) -> Config:
    """Return a serialised Dense layer."""
    config = {"name": name, "trainable": True, "dtype": "float32", "units": units, "activation": "linear"}
    return keras_object("Dense", {**config, "use_bias": True, **options}, build_config={"input_shape": [None, inputs]})


def sequential(*layers: Config, name: str = "good", inputs: int = 4) -> Config:
    """Return a serialised Sequential model."""
    start = keras_object("InputLayer", {"batch_shape": [None, inputs], "dtype": "float32", "name": "input_layer"})
    config = {"name": name, "trainable": True, "dtype": "float32", "layers": [start, *layers]}
    built = {"input_shape": [None, inputs]}
    return keras_object("Sequential", {**config, "build_input_shape": [None, inputs]}, "keras", build_config=built)


def good_config() -> Config:
    """Return 4 -> 3 -> 2 dense units, 23 weights."""
    return sequential(dense("hidden", 3, 4), dense("head", 2, 3))


def write_weights(file: h5py.File) -> None:
    """Write what `good_config` needs, as Keras stores it."""
    for key, name, shape in (("dense", "hidden", (4, 3)), ("dense_1", "head", (3, 2))):
        group = file.create_group(f"layers/{key}/vars")
        group.attrs["name"] = name
        group["0"] = np.linspace(-1, 1, shape[0] * shape[1], dtype=np.float32).reshape(shape)
        group["1"] = np.zeros(shape[1], np.float32)


def weights_bytes(write: Callable[[h5py.File], None] = write_weights) -> bytes:
    """Return an HDF5 file as bytes."""
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        write(file)
    return stream.getvalue()


def write_archive(
    path: Path,
    config: Any = None,
    weights: Callable[[h5py.File], None] | bytes = write_weights,
    version: str = "3.15.1",
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Write a `.keras` file and return its path."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": version, "date_saved": "2026-01-01@00:00:00"}))
        text = config if isinstance(config, (str, bytes)) else json.dumps(good_config() if config is None else config)
        archive.writestr("config.json", text)
        archive.writestr("model.weights.h5", weights if isinstance(weights, bytes) else weights_bytes(weights))
    return path


def with_member(path: Path, name: str, content: bytes = b"x", mode: int = 0) -> Path:
    """Return a good archive with one more member."""
    write_archive(path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
        archive.writestr(info, content)
    return path


def encrypt_flags(path: Path) -> Path:
    """Mark every member as encrypted."""
    content = bytearray(write_archive(path).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(signature)
        while start >= 0:
            content[start + offset] |= 1
            start = content.find(signature, start + 1)
    path.write_bytes(content)
    return path


def lambda_config(marker: Path) -> Config:
    """Return a serialised Lambda whose bytecode creates `marker`."""
    code = compile(f"open({str(marker)!r}, 'w')", "<payload>", "eval")
    text = base64.encodebytes(marshal.dumps(code)).decode()
    function = {"class_name": "__lambda__", "config": {"code": text, "defaults": None, "closure": None}}
    return keras_object("Lambda", {"name": "evil", "function": function, "arguments": {}})


def in_slot(**slots: Any) -> Config:
    """Return the good model with options of its head replaced."""
    config = good_config()
    config["config"]["layers"][-1]["config"].update(slots)
    return config


def compiled(**slots: Any) -> Config:
    """Return the good model compiled with these parts."""
    return {**good_config(), "compile_config": {"optimizer": "sgd", "loss": "mse", "metrics": None, **slots}}


def after_good(layer: Config) -> Config:
    """Return the good model with one more layer."""
    config = copy.deepcopy(good_config())
    config["config"]["layers"].append(layer)
    return config


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def no_models(folder: Path, marker: Path) -> dict[str, tuple[Path, str]]:
    """Return files that are something else, by name, with what the message must say."""
    legacy = folder / "legacy.keras"
    with h5py.File(legacy, "w") as file:
        file.attrs["model_config"] = json.dumps(good_config())
    saved_model = folder / "saved_model"
    saved_model.mkdir()
    (saved_model / "saved_model.pb").write_bytes(b"\x08\x01")
    good = write_archive(folder / "whole.keras").read_bytes()
    contents = {
        "empty": (b"", "is empty"),
        "text": (b"hello, this is no model\n", "a text file"),
        "gif": (b"GIF89a\x01\x00\x01\x00", "a GIF image"),
        "png": (b"\x89PNG\r\n\x1a\n" + bytes(20), "a PNG image"),
        "zeros": (bytes(5000), "filled with zero bytes"),
        "noise": (bytes(range(255, 0, -1)) * 9, "an unknown binary format"),
        "pickle": (pickle.dumps(Payload(marker), protocol=4), "a Python pickle"),
        "tflite": (b"\x1c\x00\x00\x00TFL3" + bytes(40), "a TFLite model"),
        "onnx": (b"\x08\x09\x12\x07pytorch", "an ONNX model"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        "truncated_1": (good[: len(good) // 100], "a truncated zip: central directory missing"),
        "truncated_50": (good[: len(good) // 2], "a truncated zip: central directory missing"),
        "truncated_99": (good[: len(good) * 99 // 100], "a truncated zip: central directory missing"),
        "prefixed": (b"#!/bin/sh\n" + good, "not a .keras file"),
    }
    files = {"missing": (folder / "nowhere.keras", "does not exist"), "directory": (folder, "is a directory")}
    files["saved_model"] = (saved_model, "a SavedModel directory")
    files["hdf5"] = (legacy, "a model or weights of Keras 2")
    for name, (content, reason) in contents.items():
        (folder / f"{name}.keras").write_bytes(content)
        files[name] = (folder / f"{name}.keras", reason)
    return files


def broken_archives(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return archives that no Keras wrote, by name, with what the message must say."""
    files: dict[str, tuple[Path, str]] = {}

    def add(name: str, make: Callable[[Path], Any], reason: str) -> None:
        path = folder / f"{name}.keras"
        make(path)
        files[name] = (path, reason)

    def without(member: str) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            write_archive(folder / "source.zip")
            with zipfile.ZipFile(folder / "source.zip") as source, zipfile.ZipFile(path, "w") as target:
                for name in source.namelist():
                    if name != member:
                        target.writestr(name, source.read(name))

        return make

    def twice(path: Path) -> None:
        with zipfile.ZipFile(write_archive(path), "a") as archive, warnings.catch_warnings(action="ignore"):
            archive.writestr("config.json", json.dumps(after_good(keras_object("TFSMLayer", {"name": "second"}))))

    def crowd(path: Path) -> None:
        with zipfile.ZipFile(write_archive(path), "a") as archive:
            for number in range(10_001):
                archive.writestr(f"assets/{number}", b"")

    def flip(path: Path) -> None:
        content = bytearray(write_archive(path).read_bytes())
        content[content.find(np.float32(-1).tobytes())] ^= 1  # the first weight of the first layer
        path.write_bytes(content)

    add("no_config", without("config.json"), "a zip archive without config.json")
    add("no_weights", without("model.weights.h5"), "a zip archive without model.weights.h5")
    add("config_list", lambda path: write_archive(path, "[]"), "config.json must hold an object")
    add("config_empty", lambda path: write_archive(path, "{}"), "does not describe a Keras model")
    add("config_broken", lambda path: write_archive(path, '{"class_name": '), "config.json is not valid JSON")
    add(
        "config_binary",
        lambda path: write_archive(path, b'{"a": "\xff\xfe"}'),
        "config.json is not valid JSON",
    )
    add("config_deep", lambda path: write_archive(path, "[" * 200_000), "nested more than 200 deep")
    add("weights_empty", lambda path: write_archive(path, weights=b""), "model.weights.h5 is damaged")
    add(
        "weights_cut",
        lambda path: write_archive(path, weights=weights_bytes()[:900]),
        "model.weights.h5 is damaged",
    )
    add("parent", lambda path: with_member(path, "assets/../../evil"), "written outside its folder")
    add("absolute", lambda path: with_member(path, "/tmp/evil"), "written outside its folder")
    add("backslash", lambda path: with_member(path, "assets\\..\\evil"), "written outside its folder")
    add("stranger", lambda path: with_member(path, "setup.py"), "does not belong in a .keras file")
    add(
        "symlink",
        lambda path: with_member(path, "assets/a", b"/etc", stat.S_IFLNK | 0o777),
        "a symbolic link",
    )
    add("duplicate", twice, "holds 'config.json' twice")
    add("crowd", crowd, "members; at most 10,000")
    add("encrypted", encrypt_flags, "is encrypted")
    add("bomb", lambda path: with_member(path, "assets/a", bytes(40 << 20)), "a zip bomb")
    spaces = b" " * (65 << 20)
    add(
        "spaces",
        lambda path: write_archive(path, spaces, compression=zipfile.ZIP_DEFLATED),
        "at most 67,108,864",
    )
    add("flipped", flip, "Bad CRC-32 for file 'model.weights.h5'")
    return files


def broken_weights(folder: Path) -> dict[str, tuple[Path, str]]:
    """Return archives whose HDF5 file reaches outside itself or lies, with what the message must say."""
    secret = folder / "secret.bin"
    secret.write_bytes(FOREIGN_BYTES)
    other = folder / "other.h5"
    other.write_bytes(weights_bytes())

    def vars_of(file: h5py.File) -> h5py.Group:
        write_weights(file)
        return file["layers/dense/vars"]

    def external_link(file: h5py.File) -> None:
        vars_of(file)["2"] = h5py.ExternalLink(str(other), "layers/dense/vars/0")

    def soft_link(file: h5py.File) -> None:
        vars_of(file)["2"] = h5py.SoftLink("/layers/dense/vars/0")

    def hard_link(file: h5py.File) -> None:
        group = vars_of(file)
        group["2"] = group["0"]

    def cycle(file: h5py.File) -> None:
        group = vars_of(file)
        group["again"] = file["layers"]

    def external_storage(file: h5py.File) -> None:
        vars_of(file).create_dataset("2", (100,), "u1", external=[(str(secret), 0, 100)])

    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((4, 3), "f4")
        layout[:] = h5py.VirtualSource(str(other), "layers/dense/vars/0", (4, 3))
        vars_of(file).create_virtual_dataset("2", layout)

    def late(file: h5py.File) -> None:
        vars_of(file).create_dataset("2", (1 << 29,), "f4")  # 2 GiB that are never written

    def chunked(file: h5py.File) -> None:
        vars_of(file).create_dataset("2", (1 << 32,), "f4", chunks=(1 << 20,))

    def deflated(file: h5py.File) -> None:
        zeros = np.zeros(1 << 22, np.float32)
        vars_of(file).create_dataset("2", data=zeros, chunks=(1 << 20,), compression="gzip")

    def text(file: h5py.File) -> None:
        vars_of(file)["2"] = "a string"

    def fill(value: float) -> Callable[[h5py.File], None]:
        def write(file: h5py.File) -> None:
            write_weights(file)
            file["layers/dense/vars/0"][0, 0] = value
            file["layers/dense_1/vars/1"][1] = value

        return write

    cases: dict[str, tuple[Callable[[h5py.File], None], str]] = {
        "external_link": (external_link, "is a ExternalLink"),
        "soft_link": (soft_link, "is a SoftLink"),
        "hard_link": (hard_link, "a second name for another object"),
        "cycle": (cycle, "a second name for another object"),
        "external_storage": (external_storage, "reads another file (external storage)"),
        "virtual": (virtual, "is a virtual dataset"),
        "late": (late, "a shape bomb"),
        "chunked": (chunked, "a shape bomb"),
        "deflated": (deflated, "a shape bomb"),
        "text": (text, "holds no numbers"),
        "nan": (fill(np.nan), "2 tensors contain NaN or infinity: hidden/0, head/1"),
        "inf": (fill(-np.inf), "2 tensors contain NaN or infinity"),
    }
    files = {
        name: (write_archive(folder / f"{name}.keras", weights=write), reason)
        for name, (write, reason) in cases.items()
    }
    heap = bytearray(weights_bytes())
    first_size = heap.find(b"GCOL") + 24  # after the heap's header: number, count, size of the first string
    heap[first_size : first_size + 8] = (255).to_bytes(8, "little")  # the next entry: number 0 and size 0
    files["endless"] = write_archive(folder / "endless.keras", weights=bytes(heap)), "a broken string heap"
    return files


def unsafe_configs(folder: Path, marker: Path) -> dict[str, tuple[Path, str]]:
    """Return archives whose architecture names what it must not, with what the message must say."""
    evil = lambda_config(marker)
    bytecode = evil["config"]["function"]
    system = keras_object("system", {"command": f"touch {marker}"}, "os")
    run = keras_object("function", "system", "os", registered_name="system")
    nested = keras_object("TimeDistributed", {"name": "each", "layer": evil})
    lookup = {"name": "words", "vocabulary": "/etc/passwd", "max_tokens": None}
    remote = {"name": "words", "vocabulary": "http://169.254.169.254/latest", "max_tokens": None}
    gadget = {"fname": str(marker), "origin": "http://169.254.169.254/x"}
    huge_input = sequential(dense("hidden", 1, 4), inputs=1 << 40)
    code = "can run any code"
    foreign = "which is no layer or function that a model may use"
    cases: dict[str, tuple[Config, str]] = {
        "lambda": (after_good(evil), f"'evil' (Lambda) holds a Lambda, which {code}"),
        "lambda_nested": (
            after_good(sequential(evil, name="inner")),
            f"'evil' (Lambda) holds a Lambda, which {code}",
        ),
        "lambda_wrapped": (after_good(nested), f"'evil' (Lambda) holds a Lambda, which {code}"),
        "lambda_activation": (
            in_slot(activation=bytecode),
            f"'head' (Dense) holds a __lambda__, which {code}",
        ),
        "lambda_initializer": (
            in_slot(kernel_initializer=bytecode),
            f"'head' (Dense) holds a __lambda__, which {code}",
        ),
        "lambda_loss": (compiled(loss=bytecode), f"holds a __lambda__, which {code}"),
        "lambda_metric": (compiled(metrics=[[bytecode]]), f"holds a __lambda__, which {code}"),
        "lambda_optimizer": (compiled(optimizer={"a": bytecode}), f"holds a __lambda__, which {code}"),
        "tfsm": (
            after_good(keras_object("TFSMLayer", {"name": "sm", "filepath": "x"})),
            f"a TFSMLayer, which {code}",
        ),
        "torch": (
            after_good(keras_object("TorchModuleWrapper", {"name": "t"})),
            f"a TorchModuleWrapper, which {code}",
        ),
        "jax": (after_good(keras_object("JaxLayer", {"name": "t"})), f"a JaxLayer, which {code}"),
        "os_system": (after_good(system), "needs the custom class or function 'os.system'"),
        "os_function": (in_slot(activation=run), "needs the custom class or function 'os.system'"),
        "eval": (in_slot(activation=keras_object("function", "eval", "builtins")), foreign),
        "get_file": (
            after_good(keras_object("get_file", gadget, "keras.utils")),
            "'keras.utils.get_file', which is no",
        ),
        "load_model": (after_good(keras_object("load_model", {"filepath": "x"}, "keras.models")), foreign),
        "unsafe_switch": (
            after_good(keras_object("enable_unsafe_deserialization", {}, "keras.config")),
            "'keras.config.enable_unsafe_deserialization', which is no",
        ),
        "function_as_layer": (after_good(keras_object("deserialize", {}, "keras.layers")), foreign),
        "private": (after_good(keras_object("Popen", {}, "keras.src.utils.io_utils")), foreign),
        "callback": (compiled(loss=keras_object("RemoteMonitor", {}, "keras.callbacks")), foreign),
        "disguised": (
            in_slot(activation={**keras_object("ReLU", {}), "registered_name": "evil>ReLU"}),
            "needs the custom class or function 'evil>ReLU'",
        ),
        "custom": (
            after_good(keras_object("Special", {"name": "s"}, "mylib.layers")),
            "'mylib.layers.Special'",
        ),
        "script": (
            after_good(keras_object("Special", {"name": "s"}, None)),
            "'Special', which was defined in a script",
        ),
        "class_list": (
            in_slot(activation={"class_name": ["Lambda"], "config": {}}),
            "names a class by a list",
        ),
        "vocabulary": (
            after_good(keras_object("StringLookup", lookup)),
            "reads its vocabulary from '/etc/passwd'",
        ),
        "vocabulary_url": (
            after_good(keras_object("TextVectorization", remote)),
            "reads its vocabulary from 'http:",
        ),
        "units": (sequential(dense("hidden", 1 << 27, 4)), "'hidden' (Dense) asks for 536,870,912 weights"),
        "units_huge": (sequential(dense("hidden", 1 << 40, 4)), "a size bomb"),
        "units_nested": (
            after_good(keras_object("Bidirectional", {"name": "b", "layer": keras_object("LSTM", {"units": 1 << 30})})),
            "a size bomb",
        ),
        "filters": (
            after_good(keras_object("Conv2D", {"filters": 1 << 20, "kernel_size": [9, 9]})),
            "a size bomb",
        ),
        "vocabulary_size": (
            after_good(keras_object("Embedding", {"input_dim": 1 << 20, "output_dim": 512})),
            "a size bomb",
        ),
        "input": (huge_input, "declares an input that cannot fit in memory"),
        "keras_4": (good_config(), "saved by Keras 4.0.0"),
    }
    return {
        name: (
            write_archive(folder / f"{name}.keras", config, version="4.0.0" if name == "keras_4" else "3.15.1"),
            reason,
        )
        for name, (config, reason) in cases.items()
    }
