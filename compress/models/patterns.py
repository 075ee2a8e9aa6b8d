"""Shell patterns over layer paths, such as `"stem*"` or `"encoder/*/kernel"`. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from compress.errors import UsageError


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Return whether a layer path (`"encoder/conv1"`) or one of its enclosing paths fits any of `patterns`."""
    parts = path.split("/")
    prefixes = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    return any(fnmatchcase(prefix, pattern) for pattern in patterns for prefix in prefixes)


def require_matches(paths: Iterable[str], patterns: Sequence[str], option: str) -> None:
    """Raise UsageError for each pattern that fits no path, naming the nearest path."""
    known = sorted(set(paths))
    for pattern in patterns:
        if not any(matches(path, [pattern]) for path in known):
            nearest = difflib.get_close_matches(pattern, known, n=1, cutoff=0.3)
            raise UsageError(
                f"{option}: the pattern matches no layer. Received: {pattern!r}",
                f"Did you mean {nearest[0]!r}?" if nearest else f"Layers: {', '.join(known[:20]) or 'none'}.",
            )
