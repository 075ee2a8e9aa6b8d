"""The base of everything that a user configures, and the units that options are written in.

One class is the Python API, the YAML node and the command-line options. Objects are frozen and refuse unknown keys.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_SIZE_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_NUMBER = r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)\s*"


class Options(BaseModel):
    """A frozen set of options that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


def parse_fraction(value: Any) -> Any:
    """Return a fraction from `0.8`, `"80%"`, `"1/255"` or `"1 pp"` (percentage points)."""
    if isinstance(value, str):
        if found := re.fullmatch(_NUMBER + r"(%|pp)", value):
            return float(found[1]) / 100
        if found := re.fullmatch(_NUMBER + "/" + _NUMBER, value):
            if float(found[2]) == 0:
                raise ValueError(f"division by zero. Received: {value!r}")
            return float(found[1]) / float(found[2])
        raise ValueError(
            f"expected a number, a percentage such as `80%`, `1 pp` or a ratio such as `1/255`. Received: {value!r}"
        )
    return value


def parse_bytes(value: Any) -> Any:
    """Return a number of bytes from `112640`, `"110 KiB"` or `"110 kB"`."""
    if isinstance(value, str):
        found = re.fullmatch(_NUMBER + f"({'|'.join(_SIZE_UNITS)})", value)
        if not found:
            raise ValueError(f"expected a size such as `110 KiB`; units: {', '.join(_SIZE_UNITS)}. Received: {value!r}")
        return round(float(found[1]) * _SIZE_UNITS[found[2]])
    return value


Fraction = Annotated[float, BeforeValidator(parse_fraction, json_schema_input_type=float | str)]
"""A number that may also be written `80%`, `1 pp` or `1/255`."""

Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(parse_fraction, json_schema_input_type=float | str)]
"""A fraction from 0 to 1."""

Bytes = Annotated[int, Field(ge=0), BeforeValidator(parse_bytes, json_schema_input_type=int | str)]
"""A size in bytes, which may be written with a unit."""
