"""Results sample by sample as short text: small enough for a committed file, exact enough for a paired test.

Right or wrong is one bit per sample (10,000 samples take 1,668 characters); decisions are compressed integers, and
errors compressed float32. What would still be too large is left out, with the reason kept in its place.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from compress.measure.results import Count, Record

if TYPE_CHECKING:
    import numpy as np

MOST_CHARACTERS = 128 * 1024
"""A list of values whose text is longer is not kept."""

_WIDTHS = {"int8": 1, "int16": 2, "int32": 4, "float32": 4}


class PackedValues(Record):
    """One value per sample, or a few, as base64 text."""

    encoding: Literal["bits", "int8", "int16", "int32", "float32"]
    """`bits`, first sample in the highest bit, or zlib-compressed little-endian numbers."""
    count: Count
    """How many values there are."""
    data: str

    @model_validator(mode="after")
    def _holds_what_it_says(self) -> PackedValues:
        if self.encoding == "bits":
            raw, expected = _decode(self.data), (self.count + 7) // 8
            if len(raw) == expected and self.count % 8 and raw[-1] & (0xFF >> self.count % 8):
                raise ValueError(f"the bits after the last of {self.count} values must be zero")
        else:
            raw, expected = self._raw(), self.count * _WIDTHS[self.encoding]
        if len(raw) != expected:
            raise ValueError(f"expected {expected} bytes for {self.count} values. Received: {len(raw)}")
        return self

    def ones(self) -> int:
        """Return how many of the bits are set."""
        return int.from_bytes(_decode(self.data)).bit_count()

    def values(self) -> np.ndarray:
        """Return the values, `(count,)`; bits as booleans."""
        import numpy as np

        if self.encoding == "bits":
            return np.unpackbits(np.frombuffer(_decode(self.data), np.uint8), count=self.count).astype(bool)
        return np.frombuffer(self._raw(), np.dtype(self.encoding).newbyteorder("<"))

    def _raw(self) -> bytes:
        """Return the bytes, and of a bomb no more than are needed to see that it is one."""
        try:
            return zlib.decompressobj().decompress(_decode(self.data), self.count * _WIDTHS[self.encoding] + 1)
        except zlib.error:
            raise ValueError("the values are not compressed by zlib") from None


def pack_values(values: Any) -> PackedValues | str:
    """Return `values` packed, or why they are not kept.

    Args:
        values: an array of booleans, integers or floats; floats that are only 0 and 1 become bits.
    """
    import numpy as np

    flat = np.asarray(values).reshape(-1)
    if flat.dtype == bool or (flat.dtype.kind == "f" and np.isin(flat, (0.0, 1.0)).all()):
        encoding, raw = "bits", np.packbits(flat.astype(bool)).tobytes()
    elif flat.dtype.kind == "f":
        encoding, raw = "float32", zlib.compress(flat.astype("<f4").tobytes(), 9)
    else:
        reach = max(-int(flat.min()), int(flat.max())) if flat.size else 0
        encoding = "int8" if reach < 2**7 else "int16" if reach < 2**15 else "int32"
        raw = zlib.compress(flat.astype(np.dtype(encoding).newbyteorder("<")).tobytes(), 9)
    text = base64.b64encode(raw).decode("ascii")
    if len(text) > MOST_CHARACTERS:
        return f"{flat.size:,} values would take {len(text):,} characters, more than {MOST_CHARACTERS:,}"
    return PackedValues(encoding=encoding, count=flat.size, data=text)


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the values are not base64 text") from None
