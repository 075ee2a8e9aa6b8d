"""Keras masks as tensors: reading the mask that a symbolic tensor carries, and giving it another one.

Layers hand masks on by rules of their own, so a layer that is replaced by others may lose its mask or gain one.
"""

from __future__ import annotations

import keras


@keras.saving.register_keras_serializable(package="bmcompress")
class SetMask(keras.Layer):
    """Returns its first input with the second as its mask, of any shape; without a second one, with no mask."""

    def __init__(self, **options: object):
        super().__init__(**options)
        self.supports_masking = True

    def call(self, inputs: list[keras.KerasTensor]) -> keras.KerasTensor:
        return keras.ops.copy(inputs[0])  # masks are attributes, and those of the input itself must stay

    def compute_mask(self, inputs: list[keras.KerasTensor], previous_mask: object = None) -> keras.KerasTensor | None:
        return inputs[1] if len(inputs) > 1 else None

    def compute_output_spec(self, inputs: list[keras.KerasTensor]) -> keras.KerasTensor:
        return keras.KerasTensor(inputs[0].shape, dtype=inputs[0].dtype)


def mask_of(tensor: keras.KerasTensor) -> keras.KerasTensor | None:
    """Return the mask that a symbolic tensor carries, or `None`."""
    probe = _MaskProbe()
    probe(tensor)
    return probe.seen


class _MaskProbe(keras.Layer):
    def __init__(self) -> None:
        super().__init__(dtype=None, autocast=False)
        self.supports_masking = True
        self.seen: keras.KerasTensor | None = None

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        return inputs

    def compute_mask(self, inputs: keras.KerasTensor, previous_mask: keras.KerasTensor | None) -> None:
        self.seen = previous_mask

    def compute_output_spec(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)
