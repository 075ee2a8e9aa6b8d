"""Where a file is executed: on the CPU, or on an accelerator that the installed runtime can use.

A device that was asked for and is not there is an error here, never the CPU in its place: ONNX Runtime itself falls
back to the CPU with nothing but a line in a log.
"""

from __future__ import annotations

from typing import Literal, get_args

from compress.errors import SetupError, UsageError

Device = Literal["cpu", "gpu", "tensorrt", "openvino"]

PROVIDERS: dict[str, str] = {
    "cpu": "CPUExecutionProvider",
    "gpu": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
"""The execution provider of ONNX Runtime for each device."""

_PACKAGES = {"gpu": "onnxruntime-gpu", "tensorrt": "onnxruntime-gpu", "openvino": "onnxruntime-openvino"}


def require_device(device: str) -> str:
    """Return the device, or raise UsageError if it has an unknown name."""
    if device not in get_args(Device):
        raise UsageError(f"expected a device of {', '.join(get_args(Device))}. Received: {device}")
    return device


def require_provider(device: str, available: list[str]) -> list[str]:
    """Return the execution providers to ask ONNX Runtime for, the wanted one first.

    Raises:
        SetupError: this build of ONNX Runtime has no such provider.
    """
    provider = PROVIDERS[device]
    if provider not in available:
        raise SetupError(
            f"ONNX Runtime has no {provider} here. Received: {', '.join(available)}",
            f"Run `pip install {_PACKAGES.get(device, 'onnxruntime')}` in place of onnxruntime.",
        )
    return list(dict.fromkeys([provider, PROVIDERS["cpu"]]))


def require_no_fallback(device: str, used: list[str]) -> None:
    """Raise SetupError if a session does without the provider that it was asked for."""
    if PROVIDERS[device] not in used:
        raise SetupError(
            f"ONNX Runtime could not start {PROVIDERS[device]} and fell back. Received: {', '.join(used)}",
            "Check the driver and the libraries of the accelerator.",
        )


def keras_device(device: str, backend: str) -> str:
    """Return the name of a device for `keras.device`.

    Raises:
        SetupError: the backend sees no GPU, or Keras does not run on such a device.
    """
    if device == "cpu":
        return "cpu:0"
    if device != "gpu":
        raise SetupError(f"Keras does not run on {device}.", "Measure the exported .onnx file there.")
    if not _sees_gpu(backend):
        raise SetupError(f"Keras' backend {backend} sees no GPU.", "Check the driver and the build of the backend.")
    return "gpu:0"


def _sees_gpu(backend: str) -> bool:
    if backend == "tensorflow":
        import tensorflow as tf

        return bool(tf.config.list_physical_devices("GPU"))
    if backend == "torch":
        import torch

        return torch.cuda.is_available()
    if backend == "jax":
        import jax

        return any(each.platform == "gpu" for each in jax.devices())
    return False
