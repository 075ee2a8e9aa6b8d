"""Text that came from a file: names of layers, outputs and artifacts are anybody's words."""

from __future__ import annotations

import os
import re


def printable(text: str) -> str:
    """Return `text` with control characters escaped, such as those that a terminal obeys; lines stay lines."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return `text` printable and in one line."""
    return " ".join(printable(text).split())


def without_commands(text: str) -> str:
    """Return text in which GitHub Actions finds none of the commands that it reads from a step's output."""
    lines = [re.sub(r"^(\s*)::", r"\1: :", line).replace("##[", "# #[") for line in text.split("\n")]
    return "\n".join(lines)


def in_github_actions() -> bool:
    """Return whether this process is a step of GitHub Actions."""
    return os.environ.get("GITHUB_ACTIONS") == "true"
