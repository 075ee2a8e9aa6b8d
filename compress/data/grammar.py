"""The short spelling of where data is: `digits`, `npz:file.npz?take=1000`, `folder:images?size=96x96`.

Turns one string into the mapping that a recipe would write out. Imports nothing heavy and opens no file.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from compress.errors import UsageError

BUILT_IN_SETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100")
FACTORY_PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"

_SCHEMES = ("npz", "folder", "python")
_STEPS = ("rescale", "offset", "expand_dims", "flatten", "cast", "one_hot")
_FORMS = (
    f"One of {', '.join(BUILT_IN_SETS)}, npz:FILE, folder:PATH?size=96x96 or package.module:function; "
    "options follow a question mark, as in npz:data.npz?take=1000."
)


def parse_source(text: str) -> dict[str, Any]:
    """Return the mapping that a recipe would write for `text`, not yet validated.

    Raises:
        UsageError: `text` is none of the known forms; the nearest one is named.
    """
    head, mark, query = text.partition("?")
    source = _parse_head(head)
    pairs = _parse_query(text, query) if mark else []
    if source["type"] == "python":
        return {**source, "args": {key: _scalar(value) for key, value in pairs}} if pairs else source
    steps: list[dict[str, Any]] = []
    for key, value in pairs:
        if key == "offset" and steps and set(steps[-1]) == {"rescale"}:
            steps[-1]["offset"] = _scalar(value)
        elif key in _STEPS:
            steps.append({key: _scalar(value)})
        elif key in ("x", "y"):
            source[key] = _array_keys(value)
        elif key == "classes":
            source[key] = value.split(",")
        else:
            source[key] = _scalar(value)
    return {**source, "preprocess": steps} if steps else source


def _parse_head(head: str) -> dict[str, Any]:
    scheme, colon, rest = head.partition(":")
    if head in BUILT_IN_SETS:
        return {"type": "builtin", "name": head}
    if colon and scheme in _SCHEMES:
        if not rest:
            raise UsageError(f"expected a name after `{scheme}:`. Received: {head!r}", _FORMS)
        if scheme == "python":
            if not re.match(FACTORY_PATTERN, rest):
                raise UsageError(f"expected python:package.module:function. Received: {head!r}")
            return {"type": "python", "factory": rest}
        return {"type": "npz" if scheme == "npz" else "image_folder", "path": rest}
    if colon and "/" not in scheme:
        near = difflib.get_close_matches(scheme, _SCHEMES, n=1)
        if near:
            raise UsageError(
                f"unknown kind of data {scheme + ':'!r}; did you mean `{near[0]}:`? Received: {head!r}",
                f"For a module that has this name write python:{head}.",
            )
        if re.match(FACTORY_PATTERN, head):
            return {"type": "python", "factory": head}
        raise UsageError(f"unknown kind of data {scheme + ':'!r}. Received: {head!r}", _FORMS)
    if head.endswith(".npz"):
        return {"type": "npz", "path": head}
    if "/" in head or (head and Path(head).is_dir()):
        return {"type": "image_folder", "path": head}
    near = difflib.get_close_matches(head, BUILT_IN_SETS, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else "."
    raise UsageError(f"expected a reference to data{hint} Received: {head!r}", _FORMS)


def _parse_query(text: str, query: str) -> list[tuple[str, str]]:
    pairs = []
    for part in query.split("&"):
        key, equals, value = part.partition("=")
        if not key or not equals or not value:
            raise UsageError(
                f"expected key=value after the question mark, joined by `&`. Received: {part!r} in {text!r}"
            )
        pairs.append((key, unquote(value)))
    repeated = {key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1}
    if repeated:
        raise UsageError(f"`{sorted(repeated)[0]}` is given twice. Received: {text!r}")
    return pairs


def _scalar(text: str) -> Any:
    """Return a number or truth value where `text` is one, and `text` itself otherwise."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, (bool, int, float)) else text


def _array_keys(text: str) -> str | list[str] | dict[str, str]:
    """Return `"a"` as itself, `"a,b"` as a list, and `"left:a,right:b"` as input name -> key."""
    parts = text.split(",")
    if all(":" in part for part in parts):
        return dict(part.split(":", 1) for part in parts)
    return parts if len(parts) > 1 else text
