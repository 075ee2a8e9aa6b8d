"""Imports point downwards only, and start-up imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import compress

PACKAGE = Path(compress.__file__).parent

_BASE = {"errors", "options", "progress", "files", "worker", "strict_yaml", "text", ""}
_MODELS = {*_BASE, "models", "data"}
_TECHNIQUE = {*_MODELS, "training"}
_BELOW_RUNNER = {
    *_TECHNIQUE, "pruning", "channels", "clustering", "depth", "low_rank", "targets", "quantization", "legacy", "restoring", "survival", "distillation", "finetuning", "passes", "deploy", "measure", "gate", "recipe", "plan",
    "manifest", "run_directory", "run_result", "recipe_library", "preparation", "tracking",
}  # fmt: skip

# What each part of the package may import from the package; "" is the package itself (its version).
ALLOWED = {
    "errors": set(),
    "progress": set(),
    "options": set(),
    "strict_yaml": {"errors"},
    "text": set(),
    "tracking": {"errors", "tracking"},
    "files": {"errors"},
    "worker": {"errors", "progress"},
    "data": {*_BASE, "data"},
    "models": _MODELS,
    "training": _TECHNIQUE,
    "pruning": {*_TECHNIQUE, "pruning"},
    "clustering": {*_TECHNIQUE, "clustering"},
    "targets": {*_MODELS, "deploy", "measure", "targets"},
    "channels": {*_TECHNIQUE, "targets", "channels"},
    "depth": {*_TECHNIQUE, "depth"},
    "low_rank": {*_TECHNIQUE, "targets", "low_rank"},
    "quantization": {*_MODELS, "quantization"},
    "legacy": {*_TECHNIQUE, "quantization", "legacy"},
    "finetuning": _TECHNIQUE,
    "distillation": _TECHNIQUE,
    "deploy": {*_MODELS, "quantization", "deploy"},
    "measure": {*_MODELS, "deploy", "measure"},
    "gate": {*_BASE, "data", "measure", "gate"},
    "passes": {
        *_TECHNIQUE,
        "pruning",
        "channels",
        "depth",
        "low_rank",
        "clustering",
        "quantization",
        "distillation",
        "finetuning",
        "legacy",
        "passes",
    },
    "restoring": {*_MODELS, "quantization", "measure"},
    "survival": {*_MODELS, "quantization", "measure"},
    "recipe": {*_BASE, "data", "passes", "gate", "tracking"},
    "recipe_library": {*_BASE, "recipe", "passes"},
    "plan": {*_BASE, "recipe", "data", "models"},
    "manifest": {*_BASE, "deploy", "measure", "gate"},
    "report": {*_BASE, "manifest", "measure", "report"},
    "run_directory": {*_BASE, "manifest"},
    "run_result": {*_BASE, "manifest", "gate", "measure", "plan"},
    "schemas": {*_BASE, "recipe"},
    "checking": {*_BELOW_RUNNER},
    "pytest_plugin": {*_BASE, "gate", "checking"},
    "rebaselining": {*_BASE, "gate", "checking"},
    "preparation": {*_TECHNIQUE, "passes", "recipe"},
    "runner": _BELOW_RUNNER,
    "quickstart": _BELOW_RUNNER,
    "cli": {*_BELOW_RUNNER, "runner", "quickstart", "checking", "rebaselining", "report", "schemas", "cli"},
}


def _part(path: Path) -> str:
    relative = path.relative_to(PACKAGE).with_suffix("")
    return "" if relative.parts == ("__init__",) else relative.parts[0]


def _imported_parts(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "compress":
            if node.module == "compress":
                yield from (alias.name if alias.name in ALLOWED else "" for alias in node.names)
            else:
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("compress."))


SOURCES = [p for p in sorted(PACKAGE.rglob("*.py")) if _part(p) and "recipes" not in p.parts]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    part = _part(path)
    assert part in ALLOWED, f"add {part} to the table"
    assert set(_imported_parts(path)) - {part} <= ALLOWED[part]


def test_no_private_framework_api():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for private in ("keras.src", "tensorflow.python", "keras._"):
            assert f"import {private}" not in text, path
            assert f"from {private}" not in text, path


def test_no_public_name_is_a_module():
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if p.is_dir()}
    assert not modules & set(compress.__all__)


_HEAVY = (
    "{'tensorflow', 'keras', 'numpy', 'h5py', 'onnx', 'onnxruntime', 'ai_edge_litert', 'yaml', 'importlib.metadata'}"
)


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import compress", "set()"),
        ("sys.argv = ['bmcompress', '--help']; import compress.cli; compress.cli.main()", "{'importlib.metadata'}"),
        ("sys.argv = ['bmcompress', 'recipe', 'show', 'quickstart']; import compress.cli; compress.cli.main()",
         "{'yaml', 'importlib.metadata'}"),
    ],
    ids=["import", "help", "recipe-show"],
)  # fmt: skip
def test_start_up_imports_nothing_heavy(code, allowed):
    script = f"import sys, atexit\natexit.register(lambda: print('LOADED', sorted({_HEAVY} & set(sys.modules) - {allowed})))\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=PACKAGE.parent
    )
    assert "LOADED []" in done.stdout, done.stdout[-500:] + done.stderr[-2000:]


def test_import_changes_no_environment_variable():
    script = "import os; before = dict(os.environ); import compress; compress.Recipe; assert dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=PACKAGE.parent)


def test_every_public_name_can_be_loaded():
    for name in compress.__all__:
        assert getattr(compress, name) is not None
