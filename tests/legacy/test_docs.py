"""docs/tfmot.md maps every public name of tfmot to ours, and names nothing of ours that there is not."""

from __future__ import annotations

import re
import types
from pathlib import Path

import compress

PAGE = (Path(__file__).parents[2] / "docs" / "tfmot.md").read_text()
_INHERITED = {"absolute_import", "division", "print_function"}


def public_names(module, seen) -> set[str]:
    """Return the public names below tfmot; of modules that only list graph patterns, the module's."""
    found = set()
    for name in dir(module):
        value = getattr(module, name)
        if name.startswith("_") or name in _INHERITED:
            continue
        if isinstance(value, types.ModuleType):
            if value.__name__.startswith("tensorflow_model_optimization") and value.__name__ not in seen:
                seen.add(value.__name__)
                found |= {name} if name.endswith("_transforms") else public_names(value, seen)
        else:
            found.add(name)
    return found


def test_every_public_name_of_tfmot_is_on_the_page(tfmot):
    names = public_names(tfmot, set())
    assert len(names) > 40
    missing = {name for name in names if not re.search(rf"\b{name}\b", PAGE)}
    assert not missing


def test_what_the_page_names_of_ours_exists():
    for name in set(re.findall(r"compress\.([A-Za-z_]+)\(?", PAGE)) - {"quantization"}:
        assert name in compress.__all__ or name in ("legacy", "layers"), name


def test_every_mapping_has_three_columns():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert all(row.count(" | ") >= 1 for row in rows) and len(rows) > 25
