"""The search for a model whose exported file costs what it may, where a cheaper measure leads the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np

from compress.errors import UsageError
from compress.progress import track
from compress.targets.files import TOLERANCE, FileCosts

_FILES = 7


@dataclass(frozen=True)
class Reached:
    """What a target led to, as shares of the whole model.

    Args:
        cost: `"parameters"`, `"macs"`, `"bytes"` or `"latency"`.
        target: what was asked for.
        predicted: by the cost model, before the model was built.
        measured: in the exported file, for bytes and latency; parameters and MACs are counted.
    """

    cost: str
    target: float
    predicted: float
    measured: float


def reach_file_share(
    build: Callable[[float], tuple[keras.Model, float]], files: FileCosts, cost: str, target: float
) -> tuple[Reached, float]:
    """Find a model whose file costs the target; return what was reached, and the share of the proxy that led to it.

    Args:
        build: returns a model that is left with such a share of a proxy, as MACs or parameters, and the exact share.
        files: measures the cost.
        cost: name of the cost.
        target: share of the original's cost.

    Raises:
        UsageError: the target cannot be met; the nearest share is named.
    """
    seen, guess = [(1.0, 1.0)], target
    with track(f"measure {cost}", _FILES) as advance:
        for _ in range(_FILES):
            model, proxy = build(guess)
            proxies, shares = (np.array(each) for each in zip(*sorted(seen), strict=True))
            predicted = float(np.interp(proxy, [0, *proxies], [0, *shares]))
            measured = files.share(model)
            advance(1, f"{measured:.3f}")
            if abs(measured - target) <= TOLERANCE * target:
                return Reached(cost, target, predicted, measured), proxy
            seen.append((proxy, measured))
            ordered = sorted(seen)
            shares = np.maximum.accumulate([share for _, share in ordered])  # noise must not turn the curve around
            guess = float(np.interp(target, [0, *shares], [0, *(each for each, _ in ordered)]))
    nearest = min((share for _, share in seen), key=lambda share: abs(share - target))
    raise UsageError(
        f"the target was not met within {TOLERANCE:.0%}: the nearest {cost} that was measured is {nearest:.1%}. "
        f"Received: {target:.1%}",
        f"Ask for {nearest:.1%}, lower `multiple_of`, or measure on a machine that does nothing else.",
    )
