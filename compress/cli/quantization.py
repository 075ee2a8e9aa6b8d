"""Commands that quantize a model: after training, or with training in the loop."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from compress.cli.passes import (
    BatchSize,
    Engine,
    EpochCount,
    Exclude,
    Include,
    LearningRate,
    Model,
    OnePass,
    Teacher,
    pass_command,
)

Scheme = Annotated[
    str,
    typer.Option(
        "--scheme",
        help="int8, int16x8, int8_dynamic, int8_weights, int4_weights, float16 or bfloat16: what is stored how.",
    ),
]
Bits = Annotated[int | None, typer.Option("--bits", min=2, max=8, help="Bits of integer weights.")]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Training samples that calibration reads.")]
Observer = Annotated[
    str | None, typer.Option("--observer", help="Range of activations: mse, min-max, moving, percentile or entropy.")
]
MixedSize = Annotated[
    str | None,
    typer.Option("--mixed-size", help="Bits layer by layer, so that weights take this: 60% of 8 bits, or 40 KiB."),
]
MaxDrop = Annotated[
    str | None,
    typer.Option(
        "--max-drop", help="Most that accuracy may fall on the files, such as '0.5 pp': else layers go back to float."
    ),
]
InputsOutputs = Annotated[
    str, typer.Option("--io", help="Type of the files' inputs and outputs: float32, int8 or uint8.")
]


@pass_command
def quantize(
    model: Model,
    scheme: Scheme = "int8",
    bits: Bits = None,
    rounding: Annotated[str | None, typer.Option("--rounding", help="nearest, adaround or gptq.")] = None,
    samples: Samples = None,
    observer: Observer = None,
    mixed_size: MixedSize = None,
    include: Include = None,
    exclude: Exclude = None,
    max_drop: MaxDrop = None,
    io: InputsOutputs = "float32",
) -> OnePass:
    """Quantize a trained model with a few hundred samples and no training."""
    options = {
        **_quantization_options(scheme, bits, samples, observer, mixed_size, include, exclude, max_drop),
        "rounding": rounding,
    }
    return OnePass("ptq", model, options, io=io)


@pass_command
def qat(
    model: Model,
    scheme: Scheme = "int8",
    bits: Bits = None,
    epochs: EpochCount = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    ranges: Annotated[
        str | None, typer.Option("--ranges", help="Ranges of activations in training: moving, frozen or learned.")
    ] = None,
    teacher: Teacher = None,
    samples: Samples = None,
    observer: Observer = None,
    mixed_size: MixedSize = None,
    include: Include = None,
    exclude: Exclude = None,
    max_drop: MaxDrop = None,
    io: InputsOutputs = "float32",
    engine: Engine = None,
) -> OnePass:
    """Train on with the rounding of the exported file in the loop."""
    options = {
        **_quantization_options(scheme, bits, samples, observer, mixed_size, include, exclude, max_drop),
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "ranges": ranges,
        "engine": engine,
        "teacher": {"path": teacher} if teacher not in (None, "input") else teacher,
    }
    return OnePass("qat", model, options, io=io)


def _quantization_options(
    scheme: str,
    bits: int | None,
    samples: int | None,
    observer: str | None,
    mixed_size: str | None,
    include: list[str] | None,
    exclude: list[str] | None,
    max_drop: str | None,
) -> dict[str, Any]:
    from compress.strict_yaml import parse_scalar

    return {
        "scheme": scheme,
        "bits": bits,
        "samples": samples,
        "observer": observer,
        "mixed": None if mixed_size is None else {"size": parse_scalar(mixed_size)},
        "include": include,
        "exclude": exclude,
        "max_drop": None if max_drop is None else parse_scalar(max_drop),
    }
