"""Weights that return to an early moment of the training after each round of pruning (lottery tickets).

Sources: Frankle et al. 2019, arXiv:1912.05671; Renda et al. 2020, arXiv:2003.02389.
"""

from __future__ import annotations

import keras
import numpy as np


class Rewinding:
    """Remembers a model's weights, and its optimizer's moments, at one moment, and puts them back.

    The optimizer's counters and its learning rate go on: whoever wants the rate rewound gives it a schedule that
    starts anew with each round.

    Args:
        model: the model that is trained.
        moment: when to remember, as a fraction of the training.
    """

    def __init__(self, model: keras.Model, moment: float):
        self._model = model
        self._moment = moment
        self._remembered: list[tuple[keras.Variable, np.ndarray]] | None = None

    def is_due(self, progress: float) -> bool:
        """Return whether the moment has come and nothing is remembered yet."""
        return self._remembered is None and progress >= self._moment

    def remember(self) -> None:
        """Keep the values as they are now."""
        if hasattr(self._model, "jax_state_sync"):
            self._model.jax_state_sync()
        optimizer = getattr(self._model, "optimizer", None)
        slots = [] if optimizer is None else [each for each in optimizer.variables if len(each.shape)]
        self._remembered = [(v, keras.ops.convert_to_numpy(v).copy()) for v in (*self._model.weights, *slots)]

    def restore(self) -> None:
        """Put the values back."""
        for variable, value in self._remembered or ():
            variable.assign(value)
