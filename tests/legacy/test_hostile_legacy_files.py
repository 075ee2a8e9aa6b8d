"""Files of Keras 2 that attack: each is refused with a ModelError, and nothing in it is executed or allocated."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from keras2_nets import plain

from compress.errors import ModelError
from compress.legacy.migrating import migrate_model


@pytest.fixture(scope="module")
def good(k2, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    plain(k2).save(folder / "good.h5")
    plain(k2).save(folder / "good.keras")
    return folder / "good.h5"


def layer_of(config, name):
    return next(each for each in config["config"]["layers"] if each["config"]["name"] == name)


def change_config(change):
    def edit(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            config = json.loads(file.attrs["model_config"])
            change(config)
            file.attrs["model_config"] = json.dumps(config)

    return edit


def as_class(name, **config):
    def change(model):
        node = layer_of(model, "hidden")
        node["class_name"] = name
        node["config"].update(config)
        node.pop("module", None)

    return change_config(change)


def with_options(layer, **options):
    return change_config(lambda model: layer_of(model, layer)["config"].update(options))


def edit_file(function):
    def edit(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            function(file)

    return edit


def external_storage(file) -> None:
    group = file["model_weights/hidden/hidden"]
    shape = group["kernel:0"].shape
    del group["kernel:0"]
    group.create_dataset("kernel:0", shape, "float32", external=[("/etc/passwd", 0, 4 * int(np.prod(shape)))])


def replace(path, value):
    def function(file) -> None:
        del file[path]
        file[path] = value

    return function


def shape_bomb(file) -> None:
    group = file["model_weights/hidden/hidden"]
    del group["kernel:0"]
    group.create_dataset("kernel:0", (1 << 40,), "float32", chunks=(1024,))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nan_weight(file) -> None:
    file["model_weights/hidden/hidden/kernel:0"][0, 0] = np.nan


def deep(path: Path) -> None:
    edit_file(lambda file: file.attrs.__setitem__("model_config", '{"a":' * 300 + "1" + "}" * 300))(path)


CODE = ["4wEAAAAAAAAAAAAAAAEAAAADAAAA8wYAAACXAHwAUwA=", None, None]
KERNEL = "model_weights/hidden/hidden/kernel:0"
CASES = {
    "lambda": (as_class("Lambda", function=CODE, function_type="lambda"), "Lambda"),
    "lambda function": (as_class("Lambda", function="system", module="os", function_type="function"), "Lambda"),
    "TFSMLayer": (as_class("TFSMLayer", filepath="/etc"), "TFSMLayer"),
    "unknown class": (as_class("Evil"), "Evil"),
    "registered class": (as_class("os>system"), "os>system"),
    "module": (change_config(lambda m: layer_of(m, "hidden").update(module="os", class_name="system")), "os"),
    "model class": (change_config(lambda m: m.update(class_name="Evil")), "Evil"),
    "operation": (as_class("TFOpLambda", function="io.read_file"), r"io\.read_file"),
    "wrapped lambda": (
        as_class("PruneLowMagnitude", layer={"class_name": "Lambda", "config": {"name": "x", "function": CODE}}),
        "Lambda",
    ),
    "activation": (with_options("hidden", activation="__import__"), "__import__"),
    "activation object": (
        with_options("hidden", activation={"module": "os", "class_name": "function", "config": "system"}),
        "system",
    ),
    "regularizer": (with_options("hidden", kernel_regularizer={"class_name": "Evil", "config": {}}), "Evil"),
    "regularizer module": (
        with_options("hidden", kernel_regularizer={"module": "os", "class_name": "system", "config": {}}),
        "system",
    ),
    "custom quantizer": (
        as_class(
            "QuantizeWrapperV2",
            layer={"class_name": "Dense", "config": {"name": "x", "units": 12}},
            quantize_config={"class_name": "Evil", "config": {}},
        ),
        "Evil",
    ),
    "size bomb": (with_options("hidden", units=10**10), "size bomb"),
    "convolution bomb": (with_options("conv", kernel_size=[10**5, 10**5]), "size bomb"),
    "input bomb": (with_options("image", batch_input_shape=[None, 10**9, 10**9, 3]), "size bomb|cannot|conv"),
    "no weights": (edit_file(lambda f: f["model_weights"].__delitem__("hidden")), "missing|damaged|hidden"),
    "other shape": (edit_file(replace(KERNEL, np.zeros((2, 2), "float32"))), "shape"),
    "text for numbers": (edit_file(replace(KERNEL, b"text")), "holds no numbers"),
    "external storage": (edit_file(external_storage), "reads another file"),
    "external link": (edit_file(replace(KERNEL, h5py.ExternalLink("/etc/passwd", "/x"))), "ExternalLink"),
    "soft link": (edit_file(replace(KERNEL, h5py.SoftLink("/optimizer_weights"))), "SoftLink"),
    "shape bomb": (edit_file(shape_bomb), "shape bomb"),
    "NaN": (edit_file(nan_weight), "NaN"),
    "cut off": (truncate, "damaged"),
    "deep JSON": (deep, "nested more than"),
    "no JSON": (edit_file(lambda f: f.attrs.__setitem__("model_config", "{")), "not valid JSON"),
    "a number for JSON": (edit_file(lambda f: f.attrs.__setitem__("model_config", 3)), "no text"),
    "no layers": (change_config(lambda m: m["config"].pop("layers")), "damaged"),
    "calls nobody": (
        change_config(lambda m: layer_of(m, "hidden").update(inbound_nodes=[[["ghost", 0, 0, {}]]])),
        "read what no layer makes",
    ),
    "a layer without options": (change_config(lambda m: layer_of(m, "hidden").update(config=None)), "config|damaged"),
}


@pytest.mark.parametrize("case", CASES)
def test_hostile_h5_is_refused(good, tmp_path, case):
    change, message = CASES[case]
    path = Path(shutil.copy(good, tmp_path / "evil.h5"))
    change(path)
    with pytest.raises(ModelError, match=message):
        migrate_model(path)


def test_hostile_archive_is_refused(good, tmp_path):
    source = good.with_suffix(".keras")

    def rewrite(change) -> Path:
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "evil.keras", "w") as new:
            for name in old.namelist():
                content = old.read(name)
                if name == "config.json":
                    config = json.loads(content)
                    change(config)
                    content = json.dumps(config).encode()
                new.writestr(name, content)
        return tmp_path / "evil.keras"

    def to_lambda(config):
        layer_of(config, "hidden").update(class_name="Lambda", module="keras.layers")

    with pytest.raises(ModelError, match="Lambda"):
        migrate_model(rewrite(to_lambda))
    with pytest.raises(ModelError, match="system"):
        migrate_model(rewrite(lambda config: layer_of(config, "hidden").update(class_name="system", module="os")))
    with pytest.raises(ModelError, match="size bomb"):
        migrate_model(rewrite(lambda config: layer_of(config, "hidden")["config"].update(units=10**10)))


@pytest.mark.parametrize("name", ["missing.h5", "folder"])
def test_no_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError):
        migrate_model(tmp_path / name)


def test_noise_never_crashes(good, tmp_path):
    random, content = np.random.default_rng(0), bytearray(good.read_bytes())
    for number in range(60):
        damaged = bytearray(content)
        for place in random.integers(0, len(damaged), 12):
            damaged[place] = random.integers(0, 256)
        path = tmp_path / f"noise{number}.h5"
        path.write_bytes(bytes(damaged))
        try:
            migrate_model(path)
        except ModelError:
            continue
