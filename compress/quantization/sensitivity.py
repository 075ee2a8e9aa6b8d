"""Which layers suffer from quantization, and how many must go back to float for a promise to hold.

Layers are known by name only; the caller measures. Losses and drops are lower-is-better numbers throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from compress.errors import PassError, UsageError
from compress.progress import track


@dataclass(frozen=True)
class LayerSensitivity:
    """What the quantization of one layer costs.

    Args:
        layer: its name.
        loss: how much worse the model is with this layer alone quantized than with none; may be negative.
    """

    layer: str
    loss: float


@dataclass(frozen=True)
class Restoration:
    """The layers that go back to float.

    Args:
        layers: names, most sensitive first.
        drop: what was measured with them in float.
        evaluations: how many measurements it took.
    """

    layers: tuple[str, ...]
    drop: float
    evaluations: int


def layer_sensitivity(
    layers: Sequence[str], measure: Callable[[frozenset[str]], float], *, baseline: float | None = None
) -> list[LayerSensitivity]:
    """Return the loss of each layer when it alone is quantized, most sensitive first.

    Layers with equal losses keep their order; a loss that is NaN comes first, as the worst of all.

    Args:
        layers: names.
        measure: returns the model's loss (lower is better, such as the mean squared error to the float outputs) with
            just the named layers quantized. Called once per layer.
        baseline: the loss with no layer quantized; measured if not given.

    Raises:
        UsageError: a layer is named twice.
    """
    _check_names(layers)
    with track("layer sensitivity", total=len(layers)) as advance:
        if baseline is None:
            baseline = float(measure(frozenset())) if layers else 0.0
        found = []
        for layer in layers:
            found.append(LayerSensitivity(layer, float(measure(frozenset([layer]))) - baseline))
            advance(note=layer)
    return sorted(found, key=lambda item: -math.inf if math.isnan(item.loss) else -item.loss)


def bit_sensitivity(
    layers: Sequence[str], bits: Iterable[int], measure: Callable[[str, int], float], *, baseline: float = 0.0
) -> dict[str, dict[int, float]]:
    """Return `{layer: {bits: loss}}`, what `assign_bits` takes.

    Args:
        layers: names.
        bits: the widths to try.
        measure: returns the model's loss (lower is better) with the named layer alone quantized, to so many bits.
        baseline: the loss with no layer quantized.
    """
    _check_names(layers)
    widths = sorted(set(bits))
    table: dict[str, dict[int, float]] = {}
    with track("bit sensitivity", total=len(layers) * len(widths)) as advance:
        for layer in layers:
            table[layer] = {}
            for width in widths:
                table[layer][width] = float(measure(layer, width)) - baseline
                advance(note=f"{layer}, {width} bits")
    return table


def layers_to_restore(
    order: Sequence[str], evaluate: Callable[[tuple[str, ...]], float], max_drop: float
) -> Restoration:
    """Return the shortest beginning of `order` that must go back to float for the drop to hold.

    Its length is doubled until the drop holds, then bisected: about `2 * log2(n)` evaluations, each an export and a
    measurement. The drop of what is returned was measured. It is the shortest if restoring more layers never hurts;
    where a metric is noisy, one layer fewer was at least measured and failed.

    Args:
        order: layers, most sensitive first.
        evaluate: returns the drop (lower is better, in the units of `max_drop`) with these layers in float and the
            others quantized; NaN counts as failed.
        max_drop: the largest drop allowed.

    Raises:
        UsageError: `max_drop` is NaN, or a layer is named twice.
        PassError: the drop does not hold even with every layer in float.
    """
    if math.isnan(max_drop):
        raise UsageError("max_drop must be a number. Received: NaN")
    _check_names(order)
    measured: dict[int, float] = {}
    with track("layers back to float") as advance:

        def holds(count: int) -> bool:
            measured[count] = float(evaluate(tuple(order[:count])))
            advance(note=f"{count} of {len(order)}: drop {measured[count]:.4g}")
            return measured[count] <= max_drop

        failed, count = -1, 0
        while not holds(count):
            if count == len(order):
                raise PassError(
                    f"a drop of at most {max_drop:g} must be reachable. "
                    f"Received: {measured[count]:g} with all {count} layers in float",
                    "The loss is not the layers': compare the float export with the model, or raise max_drop.",
                )
            failed, count = count, min(max(2 * count, 1), len(order))
        while count - failed > 1:
            middle = (failed + count) // 2
            if holds(middle):
                count = middle
            else:
                failed = middle
    return Restoration(tuple(order[:count]), measured[count], len(measured))


def _check_names(layers: Sequence[str]) -> None:
    if len(set(layers)) != len(layers):
        twice = next(name for name in layers if list(layers).count(name) > 1)
        raise UsageError(f"each layer must be named once. Received: {twice!r} twice")
