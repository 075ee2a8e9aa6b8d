"""What a layer's inputs look like: the statistics that GPTQ and AWQ calibrate on.

For the squared error of a linear layer the Hessian is the second moment of its inputs (Frantar et al. 2022,
arXiv:2210.17323). Inputs are streamed batch by batch; only sums are kept.
"""

from __future__ import annotations

import numpy as np

from compress.errors import DataError, UsageError


class Hessian:
    """Sums over a layer's inputs: outer products for GPTQ, magnitudes for AWQ.

    Args:
        features: the number of inputs of the kernel as a matrix.
        name: how errors call the layer.
        dtype: of the sums. float64 takes `8 * features**2` bytes; float32 halves that and is exact enough below some
            million rows.

    Attributes:
        rows: the number of input vectors seen so far; each position of a sequence counts.
    """

    def __init__(self, features: int, name: str = "layer", dtype: str = "float64"):
        if features < 1:
            raise UsageError(f"features must be at least 1. Received: {features}")
        self.name = name
        self.rows = 0
        self._products = np.zeros((features, features), dtype)
        self._magnitudes = np.zeros(features, "float64")

    @property
    def features(self) -> int:
        """The number of inputs of the layer's kernel."""
        return len(self._magnitudes)

    def update(self, inputs: np.ndarray) -> None:
        """Add a batch of inputs `(..., features)`; leading axes are samples and positions.

        Raises:
            DataError: the inputs have another number of features, or are not finite.
        """
        inputs = np.asarray(inputs, "float32")
        if inputs.ndim < 2 or inputs.shape[-1] != self.features:
            raise DataError(
                f"inputs of {self.name!r} must have the shape (samples, {self.features}). Received: {inputs.shape}"
            )
        inputs = inputs.reshape(-1, self.features)
        with np.errstate(over="ignore", invalid="ignore"):  # said below
            products = inputs.T @ inputs  # float32: its sums within a batch are short
        if not np.isfinite(products).all():
            raise DataError(f"inputs of {self.name!r} must be finite. Received: NaN, infinite or overflowing values")
        self._products += products
        self._magnitudes += np.abs(inputs).sum(axis=0, dtype="float64")
        self.rows += len(inputs)

    def divided_by(self, factors: np.ndarray) -> Hessian:
        """Return what this would be had every input been divided by `factors` `(features,)`, as AWQ divides them."""
        result = Hessian(self.features, self.name, self._products.dtype.name)
        inverse = 1.0 / np.asarray(factors, result._products.dtype)
        result._products = self._products * inverse[:, None] * inverse
        result._magnitudes = self._magnitudes * np.abs(inverse)
        result.rows = self.rows
        return result

    def require_data(self) -> None:
        """Refuse to calibrate on nothing.

        Raises:
            DataError: no input was seen, or all inputs were zero.
        """
        help_text = "Check that the calibration samples reach this layer, or exclude it."
        if self.rows == 0:
            raise DataError(f"layer {self.name!r} must see calibration data. Received: no inputs", help_text)
        if not self._magnitudes.any():
            raise DataError(
                f"layer {self.name!r} must see calibration data. Received: {self.rows} inputs, all of them zero",
                help_text,
            )

    def mean_products(self) -> np.ndarray:
        """Return the mean of `x x^T` over all inputs, `(features, features)`; a new array.

        Raises:
            DataError: see `require_data`.
        """
        self.require_data()
        return self._products / self._products.dtype.type(self.rows)

    def mean_magnitudes(self) -> np.ndarray:
        """Return the mean of `|x|` over all inputs, `(features,)`.

        Raises:
            DataError: see `require_data`.
        """
        self.require_data()
        return self._magnitudes / self.rows


def output_error(difference: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Return the mean squared change of each output, `(out,)`, when a kernel changes by `difference`.

    Args:
        difference: float kernel minus quantized kernel, `(in, out)`.
        products: `Hessian.mean_products()`, `(in, in)`.
    """
    difference = difference.astype(products.dtype)
    return np.einsum("io,io->o", difference, products @ difference)
