"""The pass `prune_channels`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from compress.options import parse_fraction
from compress.passes.base import Pass
from compress.passes.training import TeacherOption, resolve_teacher, train_copy
from compress.training.options import Training

if TYPE_CHECKING:
    import keras

    from compress.data.split import Data

Ratio = Annotated[float, Field(ge=0, lt=1), BeforeValidator(parse_fraction, json_schema_input_type=float | str)]
"""A share of the channels, such as `0.5` or `50%`."""

Left = Annotated[float, Field(gt=0, le=1), BeforeValidator(parse_fraction, json_schema_input_type=float | str)]
"""A share of a cost, such as `0.5` or `50%`."""


class ChannelPruning(Training, Pass):
    """Remove whole channels: the model gets physically narrower, smaller, and faster in every runtime.

    Channels that sums, products or shared layers couple stay or go together (Fang et al. 2023, arXiv:2301.12900).
    """

    changes_structure: ClassVar[bool] = True
    type: Literal["prune_channels"] = "prune_channels"
    ratio: Ratio | dict[str, Ratio] | None = None
    """Share of the channels to remove from each group, `0.5` or `50%`, or shares by pattern over layer paths."""
    target: dict[Literal["parameters", "macs", "bytes", "latency"], Left] | None = None
    """Instead of a ratio, the share that is to be left of the parameters, the multiply-accumulates, the bytes of the
    exported file, or the time that it takes on this machine: `{latency: 50%}`."""
    tolerance: Left = 0.03
    """How far from the target, as a share of it, the result may be."""
    runtime: Literal["tflite", "onnx"] = "tflite"
    """Of a target in bytes or latency: LiteRT or ONNX Runtime."""
    threads: int = Field(default=1, ge=1)
    """Threads of that runtime."""
    importance: Literal["l1", "l2", "bn_scale", "fpgm", "taylor", "hessian", "activation", "random"] = "l2"
    """What makes a channel important: the size of its weights, the factor that batch norm gives it, its distance to the
    others (He et al. 2018, arXiv:1811.00250), what the loss or the outputs would suffer, how strong it is on
    samples, or chance."""
    ranking: Literal["local", "global"] = "local"
    """`local`: each group loses this share; `global`: all of them together do."""
    multiple_of: int = Field(default=8, ge=1)
    """Numbers of channels are rounded to a multiple: runtimes compute 63 channels more slowly than 64."""
    minimum: int = Field(default=1, ge=1)
    """Channels that stay at least, wherever some are removed."""
    norm: Literal["freeze", "allow"] = "freeze"
    """Whether channels that LayerNormalization, RMSNormalization or GroupNormalization norm over may go, though their
    statistics change."""
    probe: bool = False
    """Whether layers that nobody knows are tried out with fewer channels instead of left as they are."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns over layer paths; a group may lose channels if all layers that make them fit."""
    exclude: tuple[str, ...] = ()
    """Shell patterns over layer paths; a group with such a layer stays as it is."""
    steps: int = Field(default=1, ge=1, le=100)
    """In how many rounds channels go; the epochs are spread over them."""
    epochs: int = Field(default=3, ge=0, le=1_000_000)
    """Epochs of training afterwards; 0 only cuts, and needs no data."""
    teacher: TeacherOption = None
    """A model that teaches meanwhile: a `.keras` file, or `input` for the model that the recipe starts from."""
    _kept: dict[str, list[int]] = PrivateAttr(default_factory=dict)
    _reached: dict[str, Any] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if (self.ratio is None) == (self.target is None):
            raise ValueError(f"expected a ratio or a target. Received: ratio={self.ratio}, target={self.target}")
        if self.target is not None and len(self.target) != 1:
            raise ValueError(f"expected one target. Received: {self.target}")
        return self

    def apply(self, model: keras.Model, data: Data) -> keras.Model:
        """Return a narrower copy of `model`, whose batch-norm statistics are new where there are samples."""
        from compress.channels.pruning import prune_channels
        from compress.training.batch_norm import reestimate_batch_norm

        teacher = resolve_teacher(self.teacher, model)
        self._kept.clear()
        self._reached, left, predicted = None, 1.0, 1.0
        for index in range(self.steps):
            result = prune_channels(
                model,
                self._share_of_a_step(self.ratio),
                target=self._target_of_a_step(left, self.steps - index),
                tolerance=self.tolerance if index == self.steps - 1 else math.inf,  # only the end counts
                runtime=self.runtime,
                threads=self.threads,
                importance=self.importance,
                ranking=self.ranking,
                include=self.include,
                exclude=self.exclude,
                multiple_of=self.multiple_of,
                minimum=self.minimum,
                norm=self.norm,
                probe=self.probe,
                data=data.train,
            )
            self._note(result.kept)
            if result.reached is not None:
                left, predicted = left * result.reached.measured, left * result.reached.predicted
                ((cost, target),) = self.target.items()
                self._reached = {"cost": cost, "target": target, "predicted": predicted, "measured": left}
            model = result.model
            if data.train is not None:
                reestimate_batch_norm(model, data)
            epochs = self.epochs * (index + 1) // self.steps - self.epochs * index // self.steps
            if epochs:
                part = self.model_copy(update={"epochs": epochs})
                model = train_copy(model, data, part, teacher=teacher)
        return model

    def check(self, model: keras.Model) -> None:
        """Raise an error where no channel can go, or the calls of the model are known to Python alone."""
        from compress.channels.groups import find_channel_groups
        from compress.channels.pruning import require_choice
        from compress.channels.selection import select_groups

        groups = find_channel_groups(model, norm=self.norm, probe=self.probe)
        select_groups(groups, self.include, self.exclude)
        require_choice(self.ratio, self.target, [path for group in groups.groups for path in group.producers])

    def needs_data(self) -> tuple[str, ...]:
        """Return the splits that it reads; cutting at once reads none, unless its score needs gradients."""
        return ("train",) if self.epochs or self.importance in ("taylor", "hessian", "activation") else ()

    def record(self) -> dict[str, Any]:
        """Return the channels that were kept by path of each layer that lost some, and what became of the target."""
        found: dict[str, Any] = {"kept_channels": dict(self._kept)}
        return found if self._reached is None else found | {"target": self._reached}

    def _share_of_a_step(self, ratio: float | dict[str, float] | None) -> float | dict[str, float] | None:
        """Return the ratio with which all steps together remove the one that is asked for."""
        if isinstance(ratio, dict):
            return {pattern: self._share_of_a_step(value) for pattern, value in ratio.items()}
        return None if ratio is None else 1 - (1 - ratio) ** (1 / self.steps)

    def _target_of_a_step(self, left: float, steps: int) -> dict[str, float] | None:
        """Return what is to be left of the model as it is, if so much is left and so many steps come."""
        return self.target and {cost: min(1.0, (share / left) ** (1 / steps)) for cost, share in self.target.items()}

    def _note(self, kept: dict[str, list[int]]) -> None:
        """Remember which channels of the first model are left."""
        for path, indices in kept.items():
            before = self._kept.get(path)
            self._kept[path] = indices if before is None else [before[index] for index in indices]
