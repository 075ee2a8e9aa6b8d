"""Which kernels of a model a technique changes; a selection that cannot be changed is refused by name."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from compress.errors import UsageError
from compress.models.patterns import matches
from compress.models.walking import Kernel, Skipped, find_kernels, find_layers

_QUANTIZED = "QuantizedLayer"  # by its name: models know no technique


def select_trainable(
    model: keras.Model,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    *,
    allow_quantized: bool = False,
    verb: str,
) -> tuple[list[Kernel], list[Skipped]]:
    """Return the kernels to change, and what is left alone.

    Args:
        model: a built model.
        include: shell patterns over layer or kernel paths; a kernel must fit one of them.
        exclude: shell patterns; a kernel that fits one of them is left alone.
        allow_quantized: accept kernels of a fake-quantized model, as for holding what is already there.
        verb: what is done to them, such as `"cluster"`, for messages.

    Raises:
        UsageError: a pattern matches nothing, or nothing that can be changed (frozen, integer, without kernel), or a
            kernel is fake-quantized.
    """
    kernels, skipped = find_kernels(model, include, exclude)
    _refuse_fruitless(kernels, skipped, include)
    if not allow_quantized:
        quantized = {path for path, layer in find_layers(model) if type(layer).__name__ == _QUANTIZED}
        for kernel in kernels:
            if kernel.layer_path in quantized:
                raise UsageError(
                    f"expected kernels that are not quantized. Received: {kernel.path} of a fake-quantized layer",
                    f"{verb.capitalize()} before you quantize: give the float model.",
                )
    return kernels, skipped


def _refuse_fruitless(kernels: Sequence[Kernel], skipped: Sequence[Skipped], include: Sequence[str]) -> None:
    """Refuse a pattern that asks for what cannot be changed and nothing else; a wider one leaves that alone."""
    for pattern in include:
        if any(matches(kernel.path, [pattern]) for kernel in kernels):
            continue
        for each in skipped:
            if matches(each.path, [pattern]) and each.reason not in ("not included", "excluded"):
                raise UsageError(
                    f"include: expected kernels that can be changed. Received: {pattern!r}: {each.path}: {each.reason}",
                    "Leave it out of include; a frozen layer needs trainable=True.",
                )
