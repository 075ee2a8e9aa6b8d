"""Charts of quality against cost with the Pareto front, drawn by Bokeh in the reader's browser.

Colours read on light and dark paper alike (Okabe and Ito 2008), so one drawing serves both.
"""

from __future__ import annotations

from collections.abc import Sequence

from bokeh.embed import components
from bokeh.models import ColumnDataSource, HoverTool, Whisker
from bokeh.plotting import figure
from bokeh.resources import Resources

from compress.measure.tables import format_error, format_ms, format_percent
from compress.report.collecting import Point, front

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
MARKERS = {"tflite": "circle", "onnx": "square", "keras": "triangle"}
_INK = "#7d7d7d"


def draw_charts(points: Sequence[Point]) -> tuple[str, dict[str, str]]:
    """Return the scripts of all charts, and an element for each by what is on its horizontal axis.

    There is a chart of `"latency"` and one of `"size"`, each of the files that have both numbers; one that would be
    empty is left out.
    """
    costs = {
        "latency": ("p50 of one inference, ms (log)", lambda point: point.latency_ms),
        "size": ("file, KiB (log)", lambda point: point.result.size.file_bytes / 1024),
    }
    figures = {}
    for name, (label, cost) in costs.items():
        shown = [each for each in points if cost(each) and each.quality and each.quality.value is not None]
        if shown:
            figures[name] = _draw(shown, label, [cost(each) for each in shown])
    if not figures:
        return "", {}
    script, elements = components(figures)
    return script, elements


def library() -> str:
    """Return the script elements with the part of Bokeh that the charts need, for a page without requests."""
    return Resources(mode="inline", components=["bokeh"]).render_js()


def _draw(points: Sequence[Point], label: str, costs: Sequence[float]) -> figure:
    higher = points[0].quality.higher_is_better
    scale, unit = (100, " %") if higher else (1, "")
    show = format_percent if higher else format_error
    values = [scale * each.quality.value for each in points]
    intervals = [each.quality.ci95 or (each.quality.value, each.quality.value) for each in points]
    low, high = scale * min(each[0] for each in intervals), scale * max(each[1] for each in intervals)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    plot = figure(
        height=440,
        y_range=(low - margin, high + margin),
        sizing_mode="stretch_width",
        x_axis_label=label,
        y_axis_label=f"{points[0].metric}{unit}",
        x_axis_type="log",
        tools="pan,wheel_zoom,box_zoom,reset,save",
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
    )
    plot.toolbar.logo = None
    for axis in plot.axis:
        axis.axis_label_text_color = axis.major_label_text_color = _INK
        axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = _INK
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
    plot.grid.grid_line_color, plot.grid.grid_line_alpha = _INK, 0.2
    best = front(list(zip(costs, values, strict=True)), higher)
    plot.line(
        [costs[i] for i in best],
        [values[i] for i in best],
        color=_INK,
        line_dash="dashed",
        line_width=1.5,
        name="front",
    )
    runs = list(dict.fromkeys(each.run for each in points))
    drawn = []
    for run in runs:
        for kind, marker in MARKERS.items():
            own = [i for i, each in enumerate(points) if each.run == run and each.result.format == kind]
            if not own:
                continue
            data = ColumnDataSource(
                {
                    "cost": [costs[i] for i in own],
                    "value": [values[i] for i in own],
                    "low": [scale * intervals[i][0] for i in own],
                    "high": [scale * intervals[i][1] for i in own],
                    "file": [points[i].result.file for i in own],
                    "run": [run] * len(own),
                    "quality": [show(points[i].quality.value) for i in own],
                    "latency": [format_ms(points[i].latency_ms) for i in own],
                    "bytes": [f"{points[i].result.size.file_bytes:,}" for i in own],
                }
            )
            colour = COLOURS[runs.index(run) % len(COLOURS)]
            whisker = Whisker(base="cost", upper="high", lower="low", source=data, line_color=colour, line_alpha=0.6)
            for head in (whisker.upper_head, whisker.lower_head):
                head.size, head.line_color, head.line_alpha = 6, colour, 0.6
            plot.add_layout(whisker)
            legend = f"{run}, {kind}" if len(runs) > 1 else kind
            options = {"size": 11, "color": colour, "line_color": "white", "line_width": 0.5}
            drawn.append(plot.scatter("cost", "value", source=data, marker=marker, legend_label=legend, **options))
    tips = [("file", "@file"), ("run", "@run"), (points[0].metric, "@quality"), ("p50 ms", "@latency")]
    plot.add_tools(HoverTool(renderers=drawn, tooltips=[*tips, ("bytes", "@bytes")]))
    legend = plot.legend[0]
    legend.background_fill_alpha, legend.border_line_alpha = 0, 0
    legend.label_text_color, legend.label_text_font_size, legend.orientation = _INK, "12px", "horizontal"
    legend.ncols = min(4, len(drawn))
    plot.add_layout(legend, "above")
    return plot
