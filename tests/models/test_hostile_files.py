"""Every hostile or wrong file is refused with its reason, and nothing in it runs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import hostile_files
import pytest

from compress.errors import ModelError
from compress.models.archive import check_archive, read_archive
from compress.models.inspection import inspect_model

NO_MODELS = [
    "missing", "directory", "saved_model", "hdf5", "empty", "text", "gif", "png", "zeros", "noise",
    "pickle", "tflite", "onnx", "lfs", "truncated_1", "truncated_50", "truncated_99", "prefixed",
]  # fmt: skip
ARCHIVES = [
    "no_config", "no_weights", "config_list", "config_empty", "config_broken", "config_binary",
    "config_deep", "weights_empty", "weights_cut", "parent", "absolute", "backslash", "stranger",
    "symlink", "duplicate", "crowd", "encrypted", "bomb", "spaces", "flipped",
]  # fmt: skip
WEIGHTS = [
    "external_link", "soft_link", "hard_link", "cycle", "external_storage", "virtual", "late",
    "chunked", "deflated", "text", "nan", "inf", "endless",
]  # fmt: skip
CONFIGS = [
    "lambda", "lambda_nested", "lambda_wrapped", "lambda_activation", "lambda_initializer",
    "lambda_loss", "lambda_metric", "lambda_optimizer", "tfsm", "torch", "jax", "os_system",
    "os_function", "eval", "get_file", "load_model", "unsafe_switch", "function_as_layer", "private",
    "callback", "disguised", "custom", "script", "class_list", "vocabulary", "vocabulary_url", "units",
    "units_huge", "units_nested", "filters", "vocabulary_size", "input", "keras_4",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def marker(folder: Path) -> Path:
    return folder / "the-payload-ran"


@pytest.fixture(scope="module")
def files(folder: Path, marker: Path) -> dict[str, tuple[Path, str]]:
    found: dict[str, tuple[Path, str]] = {}
    for kind, made in (
        ("model", lambda path: hostile_files.no_models(path, marker)),
        ("archive", hostile_files.broken_archives),
        ("weights", hostile_files.broken_weights),
        ("config", lambda path: hostile_files.unsafe_configs(path, marker)),
    ):
        place = folder / kind
        place.mkdir()
        found |= {f"{kind}-{name}": case for name, case in made(place).items()}
    return found


def test_every_generated_file_is_tested(files: dict[str, tuple[Path, str]]) -> None:
    named = {"model": NO_MODELS, "archive": ARCHIVES, "weights": WEIGHTS, "config": CONFIGS}
    assert set(files) == {f"{kind}-{name}" for kind, names in named.items() for name in names}


@pytest.mark.parametrize(
    "case",
    [f"model-{name}" for name in NO_MODELS]
    + [f"archive-{name}" for name in ARCHIVES]
    + [f"weights-{name}" for name in WEIGHTS]
    + [f"config-{name}" for name in CONFIGS],
)
def test_hostile_file_is_refused(case: str, files: dict[str, tuple[Path, str]], marker: Path) -> None:
    path, reason = files[case]
    started = time.process_time()
    with pytest.raises(ModelError) as caught:
        check_archive(path)
    assert reason in caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400 + len(str(path))
    assert caught.value.exit_code == 4
    assert "SECRET" not in str(caught.value)
    assert time.process_time() - started < 2
    assert not marker.exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_unsafe_architecture_can_be_looked_at(name: str, files: dict[str, tuple[Path, str]], marker: Path) -> None:
    try:
        inspect_model(files[f"config-{name}"][0])
    except ModelError:
        assert name == "class_list"
    assert not marker.exists()


def test_help_names_the_way_out(files: dict[str, tuple[Path, str]]) -> None:
    with pytest.raises(ModelError) as custom:
        check_archive(files["config-custom"][0])
    assert custom.value.help == "If you trust it, pass --allow-import mylib."
    with pytest.raises(ModelError) as legacy:
        check_archive(files["model-hdf5"][0])
    assert "bmcompress migrate" in str(legacy.value.help)


def test_allowed_package_passes_and_only_that(files: dict[str, tuple[Path, str]]) -> None:
    check_archive(files["config-custom"][0], allow_imports=("mylib",))
    check_archive(files["config-script"][0], allow_imports=("__main__",))
    with pytest.raises(ModelError, match=r"os\.system"):
        check_archive(files["config-os_system"][0], allow_imports=("mylib", "keras", "builtins"))
    with pytest.raises(ModelError, match="can run any code"):
        check_archive(files["config-lambda"][0], allow_imports=("keras", "builtins", "__main__"))


def test_nonfinite_weights_can_be_allowed(files: dict[str, tuple[Path, str]]) -> None:
    check_archive(files["weights-nan"][0], allow_nonfinite=True)


def test_compiled_parts_can_be_left_out(files: dict[str, tuple[Path, str]]) -> None:
    check_archive(files["config-lambda_loss"][0], compiled=False)


def test_good_file_made_by_hand_passes(tmp_path: Path) -> None:
    path = hostile_files.write_archive(tmp_path / "good.keras")
    check_archive(path)
    with read_archive(path) as archive:
        check_archive(archive)
        assert archive.metadata["keras_version"] == "3.15.1"


def test_truncated_at_any_length_is_refused(tmp_path: Path) -> None:
    content = hostile_files.write_archive(tmp_path / "good.keras").read_bytes()
    path = tmp_path / "cut.keras"
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(ModelError):
            check_archive(path)


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    content = hostile_files.write_archive(tmp_path / "good.keras").read_bytes()
    path = tmp_path / "flipped.keras"
    refused = 0
    for position in range(0, len(content), 61):
        broken = bytearray(content)
        broken[position] ^= 0xFF
        path.write_bytes(broken)
        for function in (check_archive, inspect_model):
            try:
                function(path)
            except ModelError:
                refused += 1
    assert refused > 100


def test_inspection_imports_no_framework(tmp_path: Path) -> None:
    path = hostile_files.write_archive(tmp_path / "good.keras")
    program = """
import sys
from compress.models.archive import check_archive
from compress.models.digest import content_digest
from compress.models.inspection import inspect_model

check_archive(sys.argv[1])
content_digest(sys.argv[1])
assert inspect_model(sys.argv[1]).parameters == 23
heavy = {"tensorflow", "keras", "torch", "jax", "onnx", "pydantic"} & set(sys.modules)
assert not heavy, heavy
"""
    finished = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
