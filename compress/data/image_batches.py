"""Decoding of image files. Imports Keras and TensorFlow."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from compress.data.image_folder import check_pixels
from compress.data.split import first_line
from compress.errors import DataError
from compress.progress import track


def read_image(path: str, size: tuple[int, int], channels: int) -> np.ndarray:
    """Return an image as float32 `(height, width, channels)` in 0..255, resized bilinearly.

    Raises:
        DataError: the file cannot be decoded; it is named.
    """
    try:
        contents = tf.io.read_file(path)
        if bytes(contents.numpy()[:3]) == b"\xff\xd8\xff":
            height, width, _ = tf.image.extract_jpeg_shape(contents).numpy()
            check_pixels(path, width, height)
        image = tf.io.decode_image(contents, channels=channels, expand_animations=False)
        return tf.image.resize(image, size).numpy()
    except (tf.errors.OpError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"image cannot be decoded: {first_line(error)} Received: {path}") from None


class ImageBatches(keras.utils.PyDataset):
    """Batches of images that are decoded when they are asked for.

    Args:
        files: paths.
        labels: integers, one per file, or `None`.
        size: height and width in pixels.
        channels: 1 or 3.
        batch_size: images per batch; the last may have fewer.
    """

    def __init__(
        self,
        files: np.ndarray,
        labels: np.ndarray | None,
        size: tuple[int, int],
        channels: int,
        batch_size: int = 32,
    ):
        super().__init__()
        self.files, self.labels, self.size, self.channels, self.batch_size = (
            files,
            labels,
            size,
            channels,
            batch_size,
        )

    def __len__(self) -> int:
        return math.ceil(len(self.files) / self.batch_size)

    def __getitem__(self, index: int) -> Any:
        window = slice(index * self.batch_size, (index + 1) * self.batch_size)
        x = np.stack([read_image(path, self.size, self.channels) for path in self.files[window]])
        return (x,) if self.labels is None else (x, self.labels[window])

    def read_all(self) -> np.ndarray:
        """Return every image, float32 `(files, height, width, channels)`."""
        images = np.empty((len(self.files), *self.size, self.channels), np.float32)
        with track("read images", total=len(self.files)) as advance:
            for index, path in enumerate(self.files):
                images[index] = read_image(path, self.size, self.channels)
                advance()
        return images
