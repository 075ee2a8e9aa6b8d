"""Plots that a command draws on request, with matplotlib (`pip install "bmcompress[plot]"`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.errors import SetupError, UsageError

_SUFFIXES = (".png", ".svg", ".pdf")
_MOST_CURVES = 20  # more cannot be told apart


def require_plots(path: str) -> None:
    """Raise an error where a plot could not be written, before anything is measured."""
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise UsageError(f"--plot: expected a file that ends in {', '.join(_SUFFIXES)}. Received: {path!r}")
    if not Path(path).resolve().parent.is_dir():
        raise SetupError(f"{path} cannot be written. Received: a folder that does not exist")
    if find_spec("matplotlib") is None:
        raise SetupError("--plot needs matplotlib, which is not installed.", 'Run pip install "bmcompress[plot]".')


def plot_curves(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], x_label: str, y_label: str, path: str
) -> None:
    """Write a plot with a curve per name; of many, those that differ most from end to end get a name."""
    ranked = sorted(curves, key=lambda name: -abs(curves[name][-1] - curves[name][0]))
    with _axes(path) as axes:
        for name in curves:
            named = name in ranked[:_MOST_CURVES]
            style = {"label": name, "marker": "."} if named else {"color": "0.8", "zorder": 0}
            axes.plot(x, curves[name], **style)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.legend(fontsize="x-small")


def plot_bars(values: Mapping[str, float], label: str, path: str) -> None:
    """Write a plot with a bar per name, the first on top."""
    with _axes(path, height=1 + 0.25 * len(values)) as axes:
        axes.barh(list(values), list(values.values()))
        axes.invert_yaxis()
        axes.set(xlabel=label)


@contextmanager
def _axes(path: str, height: float = 5.0) -> Iterator[Any]:
    from matplotlib.figure import Figure

    from compress.files import atomic_path

    figure = Figure(figsize=(8, height), layout="constrained")
    yield figure.add_subplot()
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lower()[1:])
