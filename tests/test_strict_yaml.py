"""Strict YAML: scalars mean what YAML 1.2 says, and what is dangerous or ambiguous is refused with its line."""

from __future__ import annotations

import time

import pytest

from compress.errors import RecipeError
from compress.strict_yaml import parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.10", 1.1),
        ("-7", -7),
        (".5", 0.5),
        ("no", "no"),
        ("on", "on"),
        ("True", True),
        ("12:30", "12:30"),
        ("~", None),
        ("", None),
        ("'1e-3'", "1e-3"),
        ("1/255", "1/255"),
        ("60%", "60%"),
        ("2026-01-01", "2026-01-01"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    assert parse_yaml(f"a: {text}").value == {"a": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", r"r:3: duplicate key `a`"),
        ("a: &x [1]\nb: *x", r"r:1: anchors and aliases"),
        ("a: !!python/object/apply:os.system [echo]", r"r:1: tags are not allowed"),
        ("a: 0755", r"r:1: a leading zero"),
        ("a: .nan", r"r:1: expected a finite number"),
        ("a: -.inf", r"r:1: expected a finite number"),
        (f"a: {'9' * 5000}", r"r:1: a number of 5000 digits"),
        ("a: " + "[" * 100_000, r"r:1: nested too deeply"),
        ("a: 1\n---\nb: 2", r"r:2: expected one document"),
        ("- 1\n- 2", r"expected keys and values"),
        ("just text", r"expected keys and values"),
        ("", r"expected keys and values"),
        ("a: [1", r"r:1: not valid YAML"),
        ("a: 'x\x00y'", r"not valid YAML"),
        ("a:\n\t- 1", r"r:2: not valid YAML"),
        ("? [a, b]\n: 1", r"expected a plain key"),
    ],
)
def test_refused(text, message):
    began = time.monotonic()
    with pytest.raises(RecipeError, match=message):
        parse_yaml(text, source="r")
    assert time.monotonic() - began < 5


def test_alias_bomb_is_refused_before_it_is_built():
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
    )
    with pytest.raises(RecipeError, match="anchors and aliases"):
        parse_yaml(bomb)


def test_every_value_knows_its_line():
    document = parse_yaml("a: 1\nb:\n  - c: 2\n  - d: 3\n    e: [4,\n      5]\n")
    assert document.line_of(("b", 1, "e")) == 5
    assert document.line_of(("b", 1, "e", 1)) == 6
    assert document.line_of(("b", 1, "missing")) == 4


def test_files(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        read_yaml(tmp_path / "missing.yaml")
    (tmp_path / "big.yaml").write_bytes(b"a: " + b"x" * 2**20)
    with pytest.raises(RecipeError, match="larger than"):
        read_yaml(tmp_path / "big.yaml")
    (tmp_path / "utf16.yaml").write_bytes("a: 1".encode("utf-16"))
    with pytest.raises(RecipeError, match="not UTF-8"):
        read_yaml(tmp_path / "utf16.yaml")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_yaml(tmp_path / "bom.yaml").value == {"a": 1}
