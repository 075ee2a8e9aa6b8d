"""Numbers that an NVIDIA GPU tells of itself (NVML), through a package that is asked for only where they are wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compress.errors import SetupError


def open_gpu(what: str, read: Callable[[Any, Any], float]) -> Callable[[], float]:
    """Return a function that reads a number of the first GPU; it has been read once.

    Args:
        what: the number is, for messages, such as `"energy"`.
        read: gets the module `pynvml` and the GPU's handle.

    Raises:
        SetupError: NVML or its Python package is not there, or the GPU does not tell the number.
    """
    try:
        import pynvml
    except ImportError:
        raise SetupError(f"{what} of a GPU needs NVML", "Run `pip install nvidia-ml-py`.") from None
    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        read(pynvml, gpu)
    except pynvml.NVMLError as error:
        raise SetupError(f"the GPU does not tell its {what}: {error}") from error
    return lambda: read(pynvml, gpu)
