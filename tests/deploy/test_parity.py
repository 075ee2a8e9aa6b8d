"""Comparing outputs: numbers, and the ways in which a wrong file shows itself."""

import numpy as np
import pytest

from compress.deploy.parity import Limit, check_parity, compare_outputs
from compress.errors import ExportError

REFERENCE = np.array([[0.0, 4.0], [1.0, -4.0], [3.0, 2.0], [0.0, 1.0]], "float32")


def test_equal_outputs_have_no_difference():
    difference = compare_outputs([REFERENCE], [REFERENCE.copy()])
    assert (difference.max_abs_diff, difference.excess, difference.agreement) == (0.0, 0.0, 1.0)


def test_difference_in_numbers():
    output = REFERENCE.copy()
    output[3] = [2.0, 1.0]  # another class, and 2 of a range of 8 away
    difference = compare_outputs([REFERENCE[:, :1] / 2, REFERENCE], [REFERENCE[:, :1] / 2 + 0.25, output])
    assert difference.max_abs_diff == 2.0
    assert difference.max_rel_diff == 0.25
    assert difference.excess == 0.5  # 2 / max(1, 4); the first output is off by 0.25 / 1.5
    assert difference.worst_output == 1
    assert difference.agreement == 0.75


def test_one_output_without_classes_has_no_agreement():
    assert compare_outputs([REFERENCE[:, :1]], [REFERENCE[:, :1]]).agreement is None


def test_small_outputs_are_compared_absolutely():
    assert compare_outputs([REFERENCE / 1000], [REFERENCE / 1000 + 0.5]).excess == pytest.approx(0.5)


def test_nan_and_infinite_values_must_stand_in_the_same_places():
    reference = np.array([[np.nan, np.inf, -np.inf, 1.0]])
    assert compare_outputs([reference], [reference.copy()]).max_abs_diff == 0.0
    for wrong in (
        [[0.0, np.inf, -np.inf, 1.0]],
        [[np.nan, -np.inf, -np.inf, 1.0]],
        [[np.nan, np.inf, -np.inf, np.nan]],
    ):
        with pytest.raises(ExportError, match="output 0: expected 3 values that are NaN or infinite"):
            compare_outputs([reference], [np.array(wrong)])


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([], "expected 1 outputs. Received: 0"),
        ([REFERENCE.T], r"expected shape \(4, 2\). Received: \(2, 4\)"),
    ],
)
def test_another_structure_is_an_error(outputs, message):
    with pytest.raises(ExportError, match=message):
        compare_outputs([REFERENCE], outputs)


@pytest.mark.parametrize("file_format", ["tflite", "onnx"])
def test_a_file_of_another_model_is_found(exported, tmp_path, file_format):
    made = exported("cnn")
    samples = made.x.astype("float32")
    wrong = made.model.predict(samples, verbose=0)[:, [1, 0, 2]]
    references = {"together": [wrong], "single": [wrong[:2]]}
    with pytest.raises(
        ExportError, match=r"m\.\w+ differs from the Keras model by more than the tolerance 0.0001"
    ) as error:
        check_parity(
            made.paths[file_format],
            "m." + file_format,
            [samples],
            references,
            limit=Limit(1e-4),
            folder=tmp_path,
        )
    assert "same class in " in error.value.message


def test_the_child_that_runs_a_file_imports_no_training_framework(exported, tmp_path):
    import json
    import subprocess
    import sys

    made = exported("cnn")
    np.savez(tmp_path / "in.npz", input_0=made.x.astype("float32"))
    code = (
        "import sys, json\nfrom compress.deploy.parity import run_file\n"
        "facts = run_file(sys.argv[1], 'in.npz', 'out.npz', {'together': 10, 'single': 2})\n"
        "print(json.dumps([facts['inputs'][0]['shape'], sorted({'tensorflow', 'keras', 'torch', 'jax'} & "
        "set(sys.modules))]))"
    )
    for path in made.paths.values():
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            cwd=tmp_path,
            env={"PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout) == [[None, 8, 8, 1], []]
        with np.load(tmp_path / "out.npz") as outputs:
            assert {name: outputs[name].shape for name in outputs.files} == {
                "together_0": (10, 3),
                "single_0": (2, 3),
            }
