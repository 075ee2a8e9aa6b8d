"""Units of limits: milliseconds, and growth as a number or as a share."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from compress.options import parse_bytes

_TIME_UNITS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_SHARE = r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*"


def parse_milliseconds(value: Any) -> Any:
    """Return milliseconds from `4` or `"4 ms"`, `"250 us"`, `"1.5 s"`."""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(us|µs|ms|s)\s*", value)
        if not found:
            raise ValueError(f"expected a time such as `4 ms`; units: us, ms, s. Received: {value!r}")
        return float(found[1]) * _TIME_UNITS[found[2]]
    return value


def parse_growth(value: Any) -> Any:
    """Return a number as it is, and a share such as `"2%"` in its plainest spelling."""
    if isinstance(value, str):
        if found := re.fullmatch(_SHARE, value):
            return f"{found[1]}%"
        raise ValueError(f"expected a whole number or a share such as `2%`. Received: {value!r}")
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(f"expected a whole number or a share such as `2%`. Received: {value!r}")
    return value


def parse_byte_growth(value: Any) -> Any:
    """Return bytes from `1024` or `"1 KiB"`, and a share such as `"2%"` as it is."""
    if isinstance(value, str) and not re.fullmatch(_SHARE, value):
        try:
            return parse_bytes(value)
        except ValueError as error:
            raise ValueError(f"{error}, or a share such as `2%`") from None
    return parse_growth(value)


def grown(before: int, growth: int | str) -> int:
    """Return the most that `before` may become: exact, and rounded down where a share leaves a fraction."""
    if isinstance(growth, str):
        return int(before + before * Decimal(growth.removesuffix("%")) / 100)
    return before + growth


Milliseconds = Annotated[float, Field(gt=0), BeforeValidator(parse_milliseconds, json_schema_input_type=float | str)]
"""A time in milliseconds, which may be written with a unit."""

_Growth = Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?%$")]

CountGrowth = Annotated[_Growth, BeforeValidator(parse_growth, json_schema_input_type=int | str)]
"""How much a number may grow."""

ByteGrowth = Annotated[_Growth, BeforeValidator(parse_byte_growth, json_schema_input_type=int | str)]
"""How much a size in bytes may grow."""
