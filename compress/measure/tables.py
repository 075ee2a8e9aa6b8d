"""Benchmark results as the strings of a table; no change is ever rounded away."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.measure import results

MISSING = "-"
HEADER = [
    "file",
    "quality",
    "change",
    "agreement",
    "bytes",
    "gzip -6",
    "zstd -19",
    "non-zero weights",
    "distinct",
    "p50 ms",
    "ratio",
    "against",
    "A/A",
]
_MOST_DECIMALS = 9


def format_number(value: float, decimals: int, anchors: tuple[float, ...] = (0.0,)) -> str:
    """Return `value` with `decimals` places, or with more where fewer would print it as one of `anchors`."""
    while decimals < _MOST_DECIMALS and any(
        value != a and round(value, decimals) == round(a, decimals) for a in anchors
    ):
        decimals += 1
    text = f"{value:.{decimals}f}"
    if value != 0 and float(text) == 0:
        return f"{value:.1e}"
    return text


def format_percent(share: float, decimals: int = 2) -> str:
    """Return a share in percent; only 0 prints as 0 and only 1 as 100."""
    return f"{format_number(100 * share, decimals, (0.0, 100.0))} %"


def format_points(change: float) -> str:
    """Return a change of a share in percentage points, with its sign."""
    return f"{'+' if change > 0 else ''}{format_number(100 * change, 2)} pp"


def format_error(value: float) -> str:
    """Return an error such as mse with four significant digits."""
    return f"{value:.4g}"


def format_ms(value: float | None) -> str:
    """Return milliseconds with three significant digits."""
    if value is None:
        return MISSING
    return f"{value:.3g}" if 0 < value < 100 else f"{value:.1f}"


def format_ratio(value: float) -> str:
    """Return a ratio; only 1 prints as 1."""
    return format_number(value, 3, (0.0, 1.0))


def format_rows(result: results.FileResult) -> list[list[str]]:
    """Return one row per latency setting of `result`, or one row without latency."""
    size = result.size
    nonzero = size.nonzero_kernel_weights
    cells = [*_quality_cells(result), *(f"{n:,}" for n in (size.file_bytes, size.gzip_bytes, size.zstd_bytes))]
    cells += [MISSING if count is None else f"{count:,}" for count in (nonzero, size.distinct_weights)]
    if not result.latency:
        return [[result.file, *cells, MISSING, MISSING, MISSING, MISSING]]
    rows = []
    for latency in result.latency:
        device = "" if latency.device == "cpu" else f"{latency.device}, "
        setting = f" ({device}{latency.threads} threads, batch {latency.batch})" if len(result.latency) > 1 else ""
        rows.append([result.file + setting, *cells, *_latency_cells(latency)])
    return rows


METRIC_HEADER = ["file", "metric", "value", "95 %", "drop", "95 % of it"]


def format_metrics(result: results.FileResult) -> list[list[str]]:
    """Return one row for each metric of `result`."""
    rows = []
    for name, metric in (result.quality or {}).items():
        change = metric.drop
        cells = [metric.value, metric.ci95, change and change.value, change and change.ci95]
        rows.append([result.file, name, *(_plain(cell) for cell in cells)])
    return rows


def _plain(cell: float | tuple[float, float] | None) -> str:
    if cell is None:
        return MISSING
    return f"{format_error(cell[0])} to {format_error(cell[1])}" if isinstance(cell, tuple) else format_error(cell)


def format_html(header: list[str], rows: list[list[str]], warnings: list[str]) -> str:
    """Return a table and the warnings as HTML that needs nothing else."""
    cell = '<td style="text-align:{}">{}</td>'
    body = [
        "".join(cell.format("right" if i else "left", html.escape(text)) for i, text in enumerate(row)) for row in rows
    ]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    notes = "".join(f"<li>{html.escape(text)}</li>" for text in warnings)
    lines = "".join(f"<tr>{row}</tr>" for row in body)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return table + (f"<ul>{notes}</ul>" if notes else "")


def _quality_cells(result: results.FileResult) -> list[str]:
    metrics = result.quality or {}
    names = [n for kind in ("accuracy", "mse") for n in metrics if n.rpartition(".")[2] == kind]
    several = len(names) > 1
    values, changes = [], []
    for name in names:
        metric = metrics[name]
        share = metric.higher_is_better
        label = f"{name} " if several or not share else ""
        values.append(label + _with_interval(metric.value, metric.ci95, format_percent if share else format_error))
        if metric.drop is not None:
            worse = 0.0 - metric.drop.value if share else metric.drop.value
            changes.append(label + (format_points(worse) if share else f"{worse:+.4g}"))
    agreement = [
        _with_interval(m.value, None, format_percent) for n, m in metrics.items() if n.rpartition(".")[2] == "agreement"
    ]
    return ["; ".join(cells) or MISSING for cells in (values, changes, agreement)]


def _latency_cells(latency: results.Latency) -> list[str]:
    low, high = (format_ratio(v) for v in latency.control_ci95)
    same = math.isclose(latency.ratio, 1) and latency.ratio_ci95 == (1.0, 1.0)
    ratio = "1" if same else _with_interval(latency.ratio, latency.ratio_ci95, format_ratio)
    control = f"{low} to {high}" + (" noisy" if latency.noisy else "")
    return [format_ms(latency.p50_ms), ratio, latency.reference, control]


def _with_interval(value: float | None, interval: tuple[float, float] | None, form) -> str:
    if value is None:
        return MISSING
    return form(value) if interval is None else f"{form(value)} ({form(interval[0])} to {form(interval[1])})"
