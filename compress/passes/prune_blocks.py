"""The pass `prune_blocks`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from compress.passes.base import Pass
from compress.passes.prune_channels import Left
from compress.passes.training import TeacherOption, resolve_teacher, train_copy
from compress.training.options import Training

if TYPE_CHECKING:
    import keras

    from compress.data.split import Data


class BlockPruning(Training, Pass):
    """Drop whole residual blocks, those first without which the outputs change least: the model gets shallower."""

    changes_structure: ClassVar[bool] = True
    type: Literal["prune_blocks"] = "prune_blocks"
    count: int | None = Field(default=None, ge=1)
    """How many blocks go."""
    target: dict[Literal["parameters", "macs"], Left] | None = None
    """Instead of a count, the share of the parameters or multiply-accumulates that may be left: `{macs: 70%}`."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns over the paths of blocks, which are those of their sums."""
    exclude: tuple[str, ...] = ()
    """Shell patterns over the paths of blocks that stay."""
    samples: int = Field(default=256, ge=1)
    """How many samples tell how much the outputs change."""
    epochs: int = Field(default=3, ge=0, le=1_000_000)
    """Epochs of training afterwards."""
    teacher: TeacherOption = None
    """A model that teaches meanwhile: a `.keras` file, or `input` for the model that the recipe starts from."""
    _record: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if (self.count is None) == (self.target is None):
            raise ValueError(f"expected a count or a target. Received: count={self.count}, target={self.target}")
        return self

    def apply(self, model: keras.Model, data: Data) -> keras.Model:
        """Return a shallower copy of `model`, whose batch-norm statistics are new."""
        from compress.depth.pruning import prune_blocks
        from compress.training.batch_norm import reestimate_batch_norm

        teacher = resolve_teacher(self.teacher, model)
        result = prune_blocks(
            model,
            self.count,
            target=self.target,
            include=self.include,
            exclude=self.exclude,
            data=data.train,
            samples=self.samples,
        )
        dropped = [{"block": each.path, "layers": list(each.layers), "change": each.change} for each in result.dropped]
        self._record = {"dropped_blocks": dropped, "left": dict(result.left)}
        reestimate_batch_norm(result.model, data)
        return train_copy(result.model, data, self, teacher=teacher) if self.epochs else result.model

    def check(self, model: keras.Model) -> None:
        """Raise an error where there are too few blocks, or the calls of the model are known to Python alone."""
        from compress.depth.blocks import open_graph
        from compress.depth.pruning import require_choice, select_blocks

        graph = open_graph(model)
        require_choice(graph, select_blocks(graph, self.include, self.exclude), self.count, self.target)

    def needs_data(self) -> tuple[str, ...]:
        """Return the splits that it reads."""
        return ("train",)

    def record(self) -> dict[str, Any]:
        """Return the blocks that went, in order, with what each changed, and the shares that are left."""
        return dict(self._record)
