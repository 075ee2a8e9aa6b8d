"""The pass `cluster`."""

from __future__ import annotations

from glob import escape
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.passes.base import Pass
from compress.passes.engines import EngineOption
from compress.passes.holding import hold_structure
from compress.passes.training import TeacherOption, resolve_teacher, train_copy
from compress.training.options import Training

if TYPE_CHECKING:
    import keras

    from compress.data.split import Data


class WeightClustering(EngineOption, Training, Pass):
    """Share a few values among the weights of each kernel, and train these values (Han 2016, arXiv:1510.00149).

    The file gets smaller when it is compressed. Runtimes do not get faster from it.
    """

    changes_structure: ClassVar[bool] = True
    type: Literal["cluster"] = "cluster"
    clusters: int = Field(ge=2, le=65536)
    """The most distinct values of every selected kernel, zero among them; 16 and 32 are usual."""
    initialisation: Literal["linear", "density", "k-means++"] = "k-means++"
    """Where the values start: evenly spaced, by the density of the weights, or as near to the weights as can be."""
    granularity: Literal["per_tensor", "per_channel"] = "per_tensor"
    """`per_tensor`: a kernel has so many values; `per_channel`: each of its output channels has."""
    keep_zeros: bool = True
    """Whether zeros that an earlier pass made stay zero."""
    include: tuple[str, ...] = ("*",)
    """Shell patterns over layer paths; only these layers are clustered."""
    exclude: tuple[str, ...] = ()
    """Shell patterns over layer paths; these layers are left alone."""
    epochs: int = Field(default=2, ge=0, le=1_000_000)
    """Epochs of training; 0 clusters at once and needs no data."""
    teacher: TeacherOption = None
    """A model that teaches meanwhile: a `.keras` file, or `input` for the model that the recipe starts from."""

    @classmethod
    def ours_alone(cls) -> tuple[str, ...]:
        """Return the names of options that tfmot has no counterpart for."""
        return ("teacher",)

    def apply(self, model: keras.Model, data: Data) -> keras.Model:
        """Return a clustered copy of `model`."""
        if self.engine == "tfmot":
            from compress.legacy.engine import cluster_with_tfmot

            return cluster_with_tfmot(
                model,
                data,
                self,
                self.clusters,
                initialisation=self.initialisation,
                per_channel=self.granularity == "per_channel",
                keep_zeros=self.keep_zeros,
                include=self.include,
                exclude=self.exclude,
            )
        options = {
            "initialisation": self.initialisation,
            "granularity": self.granularity,
            "keep_zeros": self.keep_zeros,
            "include": self.include,
            "exclude": self.exclude,
        }
        if self.epochs == 0:
            from compress.clustering.clustered_weights import cluster_weights

            return cluster_weights(model, self.clusters, **options)
        from compress.clustering.callback import Clustering
        from compress.models.selection import select_trainable

        kernels, _ = select_trainable(model, self.include, self.exclude, verb="cluster")
        others = hold_structure(model, [escape(kernel.path) for kernel in kernels])
        callbacks = [*others, Clustering(self.clusters, **options)]
        return train_copy(model, data, self, teacher=resolve_teacher(self.teacher, model), callbacks=callbacks)

    def check(self, model: keras.Model) -> None:
        """Raise UsageError if a pattern matches nothing or no kernel is left to cluster."""
        from compress.models.selection import select_trainable

        select_trainable(model, self.include, self.exclude, verb="cluster")
        self.check_engine(model)

    def expectations(self) -> list[str]:
        """Return what shared values do not do."""
        return ["shared values make the compressed file smaller; neither LiteRT nor ONNX Runtime runs faster for them"]

    def needs_data(self) -> tuple[str, ...]:
        """Return the splits that training reads; clustering at once reads none."""
        return ("train",) if self.epochs else ()
