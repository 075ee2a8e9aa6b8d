"""The README's code runs, and its recipe is valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compress.gate.budgets import BudgetFile
from compress.recipe import load_recipe, validate_document
from compress.strict_yaml import parse_yaml

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_is_code_to_check():
    assert blocks("python")
    assert blocks("yaml")


@pytest.mark.parametrize("code", blocks("python"), ids=lambda c: c.splitlines()[0][:40])
def test_python(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("text", blocks("yaml"), ids=lambda t: t.splitlines()[0][:40])
def test_recipe_or_budget(text):
    document = parse_yaml(text, "README.md")
    if document.value["schema"].startswith("bmcompress/budget/"):
        validate_document(document, BudgetFile)
    else:
        load_recipe(document.value)


def test_every_command_exists():
    from typer.testing import CliRunner

    from compress.cli import app

    commands = re.findall(r"^(?:.*&& )?bmcompress (\w+)", "\n".join(blocks("sh")), re.MULTILINE)
    assert len(commands) > 5
    for name in commands:
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0, name
