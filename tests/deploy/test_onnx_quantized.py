"""ONNX files of deploy models hold the given integers and scales, run in integer kernels and agree with Keras."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import deploy_models
import keras
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress.deploy.conversion import Places
from compress.deploy.onnx_quantized import float_operators, to_quantized_onnx
from compress.deploy.onnx_runtime import OnnxRuntime
from compress.deploy.onnx_share import quantized_share
from compress.deploy.parity import run_file
from compress.deploy.runtimes import open_runtime
from compress.deploy.signature import read_signature
from compress.deploy.tracing import write_saved_model
from compress.errors import ExportError
from compress.models.walking import find_all_layers
from compress.quantization.stored import StoredWeight
from compress.worker import run_in_worker


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """Return `get(name, **options)`: a deploy model, its samples, what Keras returns and its SavedModel."""
    made = {}

    def get(name, **options):
        key = (name, *sorted(options.items()))
        if key not in made:
            keras.utils.set_random_seed(1)
            builder, model = getattr(deploy_models, name)(**options)
            signature = read_signature(model)
            saved = write_saved_model(model, signature, tmp_path_factory.mktemp(name) / "saved")
            outputs = [np.asarray(output) for output in keras.tree.flatten(model(builder.samples))]
            made[key] = SimpleNamespace(
                samples=builder.samples,
                weights=builder.weights,
                outputs=outputs,
                steps=[builder.steps.get(id(tensor)) for tensor in model.outputs],
                places=Places([layer.name for layer in find_all_layers(model)], model.name),
                job=(str(saved.folder), saved.endpoints[0], [info.name for info in signature.inputs], saved.outputs),
            )
        return made[key]

    return get


@pytest.fixture(scope="module")
def convert(deployed, tmp_path_factory):
    """Return `get(name, compute, options of the model, **options)`: the file, its path and its notes."""
    made = {}

    def get(name, compute="integer", given=(), **options):
        key = (name, compute, given, *sorted(options.items()))
        if key not in made:
            model = deployed(name, **dict(given))
            content, batch, notes = to_quantized_onnx(
                *model.job, model.places, model.weights, compute=compute, **options
            )
            path = tmp_path_factory.mktemp(name) / "model.onnx"
            path.write_bytes(content)
            made[key] = SimpleNamespace(
                content=content, batch=batch, notes=notes, path=path, deployed=model, graph=onnx.load(path).graph
            )
        return made[key]

    return get


def _largest_steps(file):
    model = file.deployed
    outputs = open_runtime(file.path).run(model.samples)
    pairs = zip(outputs, model.outputs, model.steps, strict=True)
    return [float(np.abs(found - wanted).max() / (step or 1)) for found, wanted, step in pairs]


def _constants(graph):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def _held(file):
    """Return `(integers, scales)` of each constant that a DequantizeLinear or a product reads, sorted."""
    constants, held = _constants(file.graph), []
    looked_up = {node.output[0]: node.input[0] for node in file.graph.node if node.op_type == "Gather"}
    casts = {node.output[0]: node.input[0] for node in file.graph.node if node.op_type == "Cast"}
    for node in file.graph.node:
        first = looked_up.get(node.input[0], node.input[0])
        if node.op_type == "DequantizeLinear" and first in constants:
            integers, scale, zero = (constants[name] for name in (first, *node.input[1:]))
            held.append((integers.astype(int) - int(zero.reshape(-1)[0]), scale))
        elif node.op_type == "Mul" and casts.get(node.input[0]) in constants:
            held.append((constants[casts[node.input[0]]].astype(int), constants[node.input[1]]))
    return [(np.sort(integers, axis=None), np.sort(scale, axis=None)) for integers, scale in held]


INTEGER = ("cnn", "flat_cnn", "conv1d", "volume", "attention", "several")


@pytest.mark.parametrize("name", INTEGER)
def test_integer_files_agree_and_run_in_integer_kernels(convert, name):
    file = convert(name)
    assert max(_largest_steps(file)) <= 1.01  # an integer on the other side of a tie
    found = quantized_share(file.content)
    assert found.share >= 0.95
    assert found.macs > 0
    assert not found.uncounted
    assert found.operators.get("Transpose", 0) <= (5 if name == "attention" else 1)
    assert (file.batch, file.notes) == (None, [])


@pytest.mark.parametrize("name", [*INTEGER, "transposed"])
def test_files_hold_the_given_integers_and_scales_and_no_float_weight(convert, name):
    file = convert(name)
    held = _held(file)
    floats = [values for values in _constants(file.graph).values() if values.dtype == np.float32]
    for weight in file.deployed.weights:
        integers, scale = np.sort(weight.values, axis=None), np.sort(weight.scale, axis=None)
        assert any(
            np.array_equal(integers, values) and np.array_equal(np.unique(scale), np.unique(scales))
            for values, scales in held
            if values.shape == integers.shape
        ), weight.path
        total = np.abs(weight.dequantize()).sum()
        assert not any(v.size == weight.values.size and np.isclose(np.abs(v).sum(), total, rtol=1e-4) for v in floats)


def test_operators_that_onnx_runtime_makes_of_a_cnn(convert):
    file = convert("cnn")
    assert quantized_share(file.path).operators == {
        "DequantizeLinear": 1,
        "NhwcMaxPool": 1,
        "QGemm": 1,
        "QLinearAdd": 1,
        "QLinearAveragePool": 1,
        "QLinearConcat": 1,
        "QLinearConv": 5,
        "QLinearGlobalAveragePool": 1,
        "QLinearSoftmax": 1,
        "QuantizeLinear": 1,
        "Squeeze": 1,
        "Transpose": 1,
    }
    assert float_operators(file.content, file.deployed.places) == []
    assert {node.name for node in file.graph.node if node.op_type == "Conv"} == {
        f"{layer}/Conv" for layer in ("stem", "depthwise", "point", "padded", "branch")
    }


def test_converting_twice_gives_the_same_bytes(convert, deployed):
    model = deployed("attention")
    again = to_quantized_onnx(*model.job, model.places, model.weights, compute="integer")[0]
    assert again == convert("attention").content


def test_files_take_any_batch_size(convert):
    file = convert("cnn")
    (x,), (y,) = file.deployed.samples, file.deployed.outputs
    runtime = open_runtime(file.path)
    for count in (1, 7):
        np.testing.assert_allclose(runtime.run([x[:count]])[0], y[:count], atol=1 / 256)


def test_signed_weights(convert):
    file = convert("cnn", weights="int8")
    kinds = Counter(v.dtype.name for v in _constants(file.graph).values() if v.ndim > 1)
    assert (kinds["int8"], kinds["uint8"]) == (6, 0)


@pytest.mark.parametrize(("io", "zero_point"), [("uint8", 0), ("int8", -128)])
def test_integer_inputs_and_outputs(convert, io, zero_point):
    file, plain = convert("cnn", io=io), convert("cnn")
    runtime, reference = OnnxRuntime(file.path, 1), OnnxRuntime(plain.path, 1)
    assert (runtime.inputs[0].dtype, runtime.outputs[0].dtype) == (io, io)
    assert runtime.output_grids == [(1 / 256, zero_point)]
    assert reference.output_grids == [(1 / 256, 0)]
    assert reference.outputs[0].dtype == "float32"
    x = file.deployed.samples[0]
    np.testing.assert_array_equal(runtime.run([x])[0], reference.run([x])[0])
    scale, zero = runtime.input_grids[0]
    limits = np.iinfo(io)
    integers = np.clip(np.rint(x / np.float32(scale)) + zero, limits.min, limits.max).astype(io)
    np.testing.assert_array_equal(runtime.run([integers])[0], reference.run([x])[0])
    if io == "uint8":
        assert not {"QuantizeLinear", "DequantizeLinear"} & set(quantized_share(file.content).operators)


def test_integer_indices_stay_what_they_are(convert):
    file = convert("several", io="uint8")
    assert [info.dtype for info in open_runtime(file.path).inputs] == ["uint8", "uint8", "int32"]
    assert max(_largest_steps(file)) <= 1.01


def test_what_has_no_integer_kernel_is_named(convert):
    file = convert("transposed")
    assert float_operators(file.content, file.deployed.places) == [("ConvTranspose", "up")]
    assert quantized_share(file.content).share == pytest.approx(10440 / 18216)
    assert max(_largest_steps(file)) <= 1.01
    found = float_operators(convert("attention").content, convert("attention").deployed.places)
    assert {("Mul", "norm"), ("Erf", "after up")} <= set(found)
    assert not {"Softmax", "MatMul", "Gemm"} & {operator for operator, _ in found}


def test_layers_that_were_left_out_stay_float(convert):
    """ONNX Runtime quantizes float weights between quantized activations by itself unless it is kept from it."""
    file = convert("partly_float")
    found = float_operators(file.content, file.deployed.places)
    assert [operator for operator, _ in found if operator != "Relu"] == ["Conv", "MatMul"]
    assert ("Conv", "left_out") in found
    assert max(_largest_steps(file)) <= 1.01


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers(convert, kind):
    """In a child: ONNX Runtime 1.32 aborts on pairs beside the loop that a GRU becomes."""
    file = convert("recurrent", given=(("kind", kind),))
    arrays, outputs = file.path.with_suffix(".npz"), file.path.with_suffix(".outputs.npz")
    np.savez(arrays, input_0=file.deployed.samples[0])
    arguments = {"path": str(file.path), "inputs": str(arrays), "outputs": str(outputs), "counts": {"together": 16}}
    run_in_worker(f"{run_file.__module__}:run_file", arguments)
    with np.load(outputs) as found:
        difference = np.abs(found["together_0"] - file.deployed.outputs[0]).max()
    assert difference / file.deployed.steps[0] <= 1.01
    sizes = {values.size for values, _ in _held(file)}
    assert {weight.values.size for weight in file.deployed.weights} <= sizes
    assert float_operators(file.content, file.deployed.places)[0][1] == "rnn"


def test_weights_of_both_directions_are_found(convert):
    file = convert("recurrent", given=(("bidirectional", True), ("sequences", True)))
    assert max(_largest_steps(file)) <= 1.01
    assert sum(node.op_type == "Cast" and node.name.startswith("both/") for node in file.graph.node) == 4


def test_grids_made_at_run_time(convert):
    given = (("activations", False),)
    file = convert("cnn", "dynamic", given)
    operators = quantized_share(file.content).operators
    assert (operators["ConvInteger"], operators["DynamicQuantizeMatMul"]) == (5, 1)
    assert quantized_share(file.content).share == 1
    assert max(_largest_steps(file)) < 0.005
    assert convert("several", "dynamic", given).notes == [
        "ONNX has no such integer operators, so these layers compute in float: table."
    ]


def test_a_dynamic_product_computes_what_the_documentation_says(convert):
    file = convert("tiny", "dynamic", (("activations", False),))
    weight, x = file.deployed.weights[0], file.deployed.samples[0]
    low, high = min(0, x.min()), max(0, x.max())
    step = np.float32(high - low) / np.float32(255)
    zero = np.rint(-low / step)
    q = np.clip(np.rint(x / step) + zero, 0, 255) - zero
    bias = file.deployed.outputs[0] - x @ weight.dequantize()
    expected = (q @ weight.values.astype("float64")) * (step * weight.scale) + bias
    np.testing.assert_allclose(open_runtime(file.path).run([x])[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "given", "opset", "kind"),
    [
        ("cnn", (), 17, "INT8"),
        ("flat_cnn", (("group_size", 32),), 17, "INT8"),
        ("flat_cnn", (("group_size", 16), ("weight_bits", 4)), 21, "INT4"),
        ("recurrent", (("dtype", "float16"),), 17, "FLOAT16"),
        ("several", (("dtype", "bfloat16"),), 17, "BFLOAT16"),
    ],
    ids=["int8", "groups", "int4", "float16", "bfloat16"],
)
def test_stored_weights_without_quantized_activations_are_exact(convert, name, given, opset, kind):
    file = convert(name, "weights", (("activations", False), *given))
    assert max(_largest_steps(file)) < 1e-5
    kinds = [onnx.TensorProto.DataType.Name(t.data_type) for t in file.graph.initializer]
    assert kinds.count(kind) == len(file.deployed.weights)
    assert onnx.load_from_string(file.content).opset_import[0].version == opset
    assert not {"DequantizeLinear", "MatMulNBits"} & set(quantized_share(file.content).operators)


def test_groups_of_4_bits_are_small(convert):
    file = convert("flat_cnn", "weights", (("activations", False), ("group_size", 16), ("weight_bits", 4)))
    hidden = next(w for w in file.deployed.weights if w.path.startswith("hidden"))
    tensor = next(t for t in file.graph.initializer if tuple(t.dims) == hidden.values.shape)
    assert len(tensor.raw_data) == hidden.values.size // 2
    scales = next(t for t in file.graph.initializer if tuple(t.dims) == (13, 16))  # ceil(200 / 16) groups
    assert scales.data_type == onnx.TensorProto.FLOAT


def test_activations_of_16_bits(convert):
    file = convert("attention", given=(("bits", 16),))
    assert max(_largest_steps(file)) <= 2
    assert file.notes == [
        "ONNX Runtime computes 16-bit activations in float, so the file is not faster than a float one.",
        "The file has ONNX opset 21, which is the first with 16-bit tensors.",
    ]


def test_few_bits_are_stored_in_8(convert):
    file = convert("tiny", given=(("weight_bits", 5),))
    assert file.notes == ["ONNX stores the 5-bit weights of only in 8 bits each."]
    assert "QGemm" in quantized_share(file.content).operators


def test_opset_21_on_request(convert):
    file = convert("cnn", opset=21)
    assert onnx.load_from_string(file.content).opset_import[0].version == 21
    assert quantized_share(file.content).share == 1
    assert max(_largest_steps(file)) <= 1.01


def test_a_weight_that_is_not_in_the_graph_is_named(deployed):
    model = deployed("tiny")
    given = model.weights[0]
    other = StoredWeight("other/kernel", "other", np.roll(given.values, 1), given.scale)
    with pytest.raises(ExportError, match=r"'other/kernel' of layer 'other'.*without it"):
        to_quantized_onnx(*model.job, model.places, [given, other], compute="integer")


@pytest.mark.parametrize(
    ("low", "high", "bits", "message"), [(-1, 1, 6, "8 or 16 bits"), (0, 0, 8, "holds 0 and more")]
)
def test_ranges_that_files_cannot_hold(tmp_path, low, high, bits, message):
    inputs = keras.Input((3,), name="x")
    model = keras.Model(inputs, deploy_models.Marker(low, high, bits, name="mark")(inputs), name="net")
    saved = write_saved_model(model, read_signature(model), tmp_path / "saved")
    job = (str(saved.folder), saved.endpoints[0], ["x"], saved.outputs, Places(["mark"], "net"))
    with pytest.raises(ExportError, match=message):
        to_quantized_onnx(*job, [], compute="integer")
