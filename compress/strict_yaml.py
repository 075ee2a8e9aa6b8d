"""Strict YAML: what a recipe says is what it means, and every value knows its line.

Scalars follow the YAML 1.2 core schema (`1e-3` is a number, `no` is a string). Duplicate keys, anchors, aliases, tags,
several documents, deep nesting and huge files are refused before anything is built from them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from compress.errors import RecipeError

Place = tuple[str | int, ...]
"""Where a value stands: keys and list positions from the top."""

_MAX_BYTES, _MAX_DEPTH, _MAX_NODES, _MAX_DIGITS = 2**20, 64, 50_000, 18

_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF|nan|NaN|NAN)")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass(frozen=True)
class Document:
    """A YAML file as plain Python values.

    Args:
        value: the mapping at the top.
        source: name of the file, for messages.
        lines: the line on which each value stands, counted from 1.
    """

    value: dict[str, Any]
    source: str = "<recipe>"
    lines: dict[Place, int] = field(default_factory=dict)

    def line_of(self, place: Place) -> int | None:
        """Return the line of the value at `place`, or of the nearest value around it."""
        for length in range(len(place), 0, -1):
            if place[:length] in self.lines:
                return self.lines[place[:length]]
        return None


def parse_scalar(text: str) -> Any:
    """Return the value of a plain scalar under the YAML 1.2 core schema.

    Raises:
        ValueError: for a number that is not finite, too long, or has a leading zero.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        digits = text.lstrip("+-")
        if len(digits) > _MAX_DIGITS:
            raise ValueError(f"a number of {len(digits)} digits is too long")
        if len(digits) > 1 and digits[0] == "0":
            raise ValueError(f"a leading zero is ambiguous; quote it to mean text. Received: {text}")
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"expected a finite number. Received: {text}")
    return text


def read_yaml(path: str | Path) -> Document:
    """Return the document in the file `path`, or raise RecipeError naming file and line."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > _MAX_BYTES:
        raise RecipeError(f"{path}: larger than {_MAX_BYTES} bytes, which no recipe is")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from None
    return parse_yaml(text, source=str(path))


def parse_yaml(text: str, source: str = "<recipe>") -> Document:
    """Return the document in `text`, or raise RecipeError naming source and line."""
    try:
        _check_events(text, source)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{source}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:  # such as a control character
        raise RecipeError(f"{source}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{source}: expected keys and values at the top, such as `name: my-model`")
    lines: dict[Place, int] = {}
    return Document(_build(node, (), lines, source), source, lines)


def _check_events(text: str, source: str) -> None:
    """Walk the parser's events, which cost no memory, before any node is built."""
    depth = documents = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        where = f"{source}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise RecipeError(f"{where}: anchors and aliases are not allowed; write the value out")
        if getattr(event, "tag", None) is not None:
            raise RecipeError(f"{where}: tags are not allowed. Received: {event.tag}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        if depth > _MAX_DEPTH or count > _MAX_NODES:
            raise RecipeError(f"{where}: nested too deeply or too long for a recipe")
        if documents > 1:
            raise RecipeError(f"{where}: expected one document, found a second one")


def _build(node: yaml.Node, place: Place, lines: dict[Place, int], source: str) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(place, line)
    if isinstance(node, yaml.ScalarNode):
        if node.style is not None:  # quoted or block text
            return node.value
        try:
            return parse_scalar(node.value)
        except ValueError as error:
            raise RecipeError(f"{source}:{line}: {error}") from None
    if isinstance(node, yaml.SequenceNode):
        return [_build(child, (*place, index), lines, source) for index, child in enumerate(node.value)]
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, key_line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{source}:{key_line}: expected a plain key")
        if key in result:
            first = lines[(*place, key)]
            raise RecipeError(f"{source}:{key_line}: duplicate key `{key}`", f"It is first set on line {first}.")
        lines[(*place, key)] = key_line
        result[key] = _build(value_node, (*place, key), lines, source)
    return result
