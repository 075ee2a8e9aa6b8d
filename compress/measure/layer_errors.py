"""Errors of layers, added up batch by batch, so that no activations are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class ErrorSums:
    """What MSE, signal-to-noise ratio and cosine of one layer are computed from.

    Args:
        count: numbers compared.
        error: sum of squared differences.
        power_a: sum of squares in the first file.
        power_b: sum of squares in the second file.
        product: sum of products of both.
        broken: numbers that are finite in one file only, or NaN or infinite in another way.
    """

    count: int = 0
    error: float = 0.0
    power_a: float = 0.0
    power_b: float = 0.0
    product: float = 0.0
    broken: int = 0

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Add a batch: two arrays of one shape."""
        a, b = a.reshape(-1).astype("float64"), b.reshape(-1).astype("float64")
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            self.broken += int(np.count_nonzero(~finite & ~((a == b) | (np.isnan(a) & np.isnan(b)))))
            a, b = a[finite], b[finite]
        difference = a - b
        self.count += a.size
        self.error += float(difference @ difference)
        self.power_a += float(a @ a)
        self.power_b += float(b @ b)
        self.product += float(a @ b)

    @property
    def mse(self) -> float | None:
        """Mean squared error, or `None` without a finite number."""
        return self.error / self.count if self.count else None

    @property
    def sqnr_db(self) -> float:
        """Power of the first file's values over that of the differences, in dB; infinite where there are none."""
        if self.broken or not self.count:
            return -math.inf
        if self.error == 0:
            return math.inf
        return 10 * math.log10(self.power_a / self.error) if self.power_a else -math.inf

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between both files' values, or `None` where one of them is all zeros."""
        scale = math.sqrt(self.power_a * self.power_b)
        return max(-1.0, min(1.0, self.product / scale)) if scale else None
