"""The pass `factorize`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from compress.options import parse_fraction
from compress.passes.base import Pass
from compress.passes.prune_channels import Left
from compress.passes.training import TeacherOption, resolve_teacher, train_copy
from compress.training.options import Training

if TYPE_CHECKING:
    import keras

    from compress.data.split import Data

Energy = Annotated[float, Field(gt=0, le=1), BeforeValidator(parse_fraction, json_schema_input_type=float | str)]
"""A share of the squared singular values, such as `0.9` or `90%`."""


class Factorization(Training, Pass):
    """Write kernels of dense layers and convolutions as products of smaller ones, where that is cheaper."""

    changes_structure: ClassVar[bool] = True
    type: Literal["factorize"] = "factorize"
    energy: Energy | None = None
    """Share of the squared singular values that every kernel keeps."""
    rank: int | float | dict[str, int | float] | None = None
    """Instead, how many components, or which share below 1 of them, for all layers or by pattern over paths."""
    target: dict[Literal["parameters", "macs", "bytes", "latency"], Left] | None = None
    """Instead, the share that is to be left of the parameters, the multiply-accumulates, the bytes of the exported
    file, or the time that it takes on this machine: `{macs: 50%}`."""
    runtime: Literal["tflite", "onnx"] = "tflite"
    """Of a target in bytes or latency: LiteRT or ONNX Runtime."""
    threads: int = Field(default=1, ge=1)
    """Threads of that runtime."""
    method: Literal["auto", "svd", "spatial", "tucker"] = "auto"
    """`svd`: fewer outputs, then size 1; `spatial`: along the height, then along the width (Jaderberg et al. 2014,
    arXiv:1405.3866); `tucker`: size 1, a small core, size 1 (Kim et al. 2016, arXiv:1511.06530); `auto`: for each layer
    the cheapest that keeps as much."""
    multiple_of: int = Field(default=8, ge=1)
    """Ranks are rounded up to a multiple."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns over layer paths."""
    exclude: tuple[str, ...] = ()
    """Shell patterns over layer paths that stay."""
    epochs: int = Field(default=3, ge=0, le=1_000_000)
    """Epochs of training afterwards; 0 only factorises, and needs no data."""
    teacher: TeacherOption = None
    """A model that teaches meanwhile: a `.keras` file, or `input` for the model that the recipe starts from."""
    _record: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if sum(each is not None for each in (self.energy, self.rank, self.target)) != 1:
            raise ValueError("expected one of energy, rank and target")
        return self

    def apply(self, model: keras.Model, data: Data) -> keras.Model:
        """Return a factorised copy of `model`, whose batch-norm statistics are new where there are samples."""
        from compress.low_rank.factorizing import factorize
        from compress.training.batch_norm import reestimate_batch_norm

        teacher = resolve_teacher(self.teacher, model)
        options = ("energy", "rank", "target", "runtime", "threads", "method", "include", "exclude", "multiple_of")
        result = factorize(model, **{name: getattr(self, name) for name in options})
        layers = {
            path: {"method": each.method, "ranks": list(each.ranks), "error": each.error}
            for path, each in result.layers.items()
        }
        self._record = {"factorized_layers": layers, "left": dict(result.left)}
        if result.reached is not None:
            self._record["target"] = vars(result.reached)
        if data.train is not None:
            reestimate_batch_norm(result.model, data)
        return train_copy(result.model, data, self, teacher=teacher) if self.epochs else result.model

    def check(self, model: keras.Model) -> None:
        """Raise an error where no layer can be factorised, or the calls of the model are known to Python alone."""
        from compress.low_rank.factorizing import open_graph, require_choice, select_candidates

        require_choice(self.energy, self.rank, self.target, self.multiple_of)
        select_candidates(open_graph(model), self.method, self.include, self.exclude)

    def needs_data(self) -> tuple[str, ...]:
        """Return the splits that it reads."""
        return ("train",) if self.epochs else ()

    def record(self) -> dict[str, Any]:
        """Return how each layer was factorised, the shares that are left, and what became of the target."""
        return dict(self._record)
