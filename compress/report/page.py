"""The report as one HTML file: everything that it needs is inside, and everything from a file is escaped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import SetupError
from compress.files import atomic_path
from compress.measure.results import NOT_ASKED
from compress.measure.tables import MISSING, format_ms, format_percent, format_ratio
from compress.report.collecting import MAIN_METRICS, Point, Run, read_runs

_TEMPLATE = Path(__file__).parent / "page.html.jinja"
_MOST_KERNELS = 200


def write_report(directories: Sequence[str | Path], output: str | Path) -> Path:
    """Write a report about runs, and return its path.

    Args:
        directories: run directories.
        output: the HTML file.

    Raises:
        UsageError: a directory holds no run.
        SetupError: the extra `report` is not installed.
    """
    runs = read_runs(directories)
    with atomic_path(Path(output)) as temporary:
        temporary.write_text(render_report(runs), encoding="utf-8")
    return Path(output)


def render_report(runs: Sequence[Run]) -> str:
    """Return the text of the page.

    Raises:
        SetupError: the extra `report` is not installed.
    """
    try:
        from jinja2 import Environment
        from markupsafe import Markup

        from compress.report.charts import draw_charts, library
    except ImportError as error:
        raise SetupError(
            f"the report needs a library that is not installed. Received: {error}",
            'Run `pip install "bmcompress[report]"`.',
        ) from error
    points = [point for run in runs for point in run.points]
    script, elements = draw_charts(points)
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        _TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        runs=[_describe(run) for run in runs],
        files=[_file_row(point) for point in points],
        verdict=_verdict(runs),
        charts={name: Markup(element) for name, element in elements.items()},
        script=Markup(script),
        library=Markup(library()) if elements else "",
        several=len(runs) > 1,
        data=Markup(_embedded([run.manifest.model_dump(mode="json", by_alias=True) for run in runs])),
    )


def _embedded(value: Any) -> str:
    """Return JSON that no name in it can end the element of."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")


def _verdict(runs: Sequence[Run]) -> dict[str, Any]:
    verdicts = [each.verdict for run in runs for each in run.manifest.verdicts]
    unfinished = [run.name for run in runs if run.manifest.status != "done"]
    if unfinished:
        return {"kind": "fail", "text": f"Not finished: {', '.join(unfinished)}"}
    if not verdicts:
        return {"kind": "none", "text": "No budgets were set."}
    counts = {kind: verdicts.count(kind) for kind in dict.fromkeys(verdicts)}
    kind = "fail" if "fail" in counts else "inconclusive" if "inconclusive" in counts else "pass"
    return {"kind": kind, "text": f"Budgets: {', '.join(f'{count} {name}' for name, count in counts.items())}"}


def _file_row(point: Point) -> dict[str, str]:
    result, metric = point.result, point.quality
    times = result.latency[0] if result.latency else None
    higher = metric is not None and metric.higher_is_better
    quality = MISSING
    if metric is not None and metric.value is not None:
        quality = format_percent(metric.value) if higher else f"{metric.value:.4g}"
        if metric.ci95:
            bounds = [format_percent(each) if higher else f"{each:.4g}" for each in metric.ci95]
            quality += f" ({bounds[0]} to {bounds[1]})"
    reasons = {**result.reasons, **(metric.reasons if metric else {})}
    reasons = {name: reason for name, reason in reasons.items() if reason != NOT_ASKED}
    return {
        "run": point.run,
        "file": result.file,
        "metric": point.metric,
        "quality": quality,
        "bytes": f"{result.size.file_bytes:,}",
        "gzip": f"{result.size.gzip_bytes:,}",
        "latency": format_ms(times.p50_ms) if times else MISSING,
        "ratio": format_ratio(times.ratio) if times else MISSING,
        "against": times.reference if times else MISSING,
        "reasons": "; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
    }


def _describe(run: Run) -> dict[str, Any]:
    manifest = run.manifest
    steps = [("input", manifest.input_statistics, manifest.input_metrics, manifest.input, None, "")]
    for step in manifest.steps:
        note = "reverted: it broke its max_drop" if step.reverted else "; ".join(step.notes)
        steps.append((f"{step.id} ({step.type})", step.statistics, step.metrics, step.file, step.seconds, note))
    return {
        "name": run.name,
        "title": manifest.name,
        "created": manifest.created,
        "status": manifest.status,
        "error": manifest.error,
        "steps": [_step_row(*step) for step in steps],
        "verdicts": [each.model_dump() for each in manifest.verdicts],
        "kernels": _kernel_rows(run),
        "layers": _layer_rows(run),
        "environment": _environment(run),
        "recipe": run.recipe,
        "notes": [*manifest.notes, *(manifest.benchmark.warnings if manifest.benchmark else [])],
    }


def _step_row(name: str, statistics: Any, metrics: Any, file: Any, seconds: float | None, note: str) -> dict[str, str]:
    count, sparsity, macs = (statistics.get(key) for key in ("nonzero_parameters", "sparsity", "macs"))
    return {
        "name": name,
        "quality": ", ".join(f"{key} {metrics[key]:.4g}" for key in metrics if _is_main(key)) or MISSING,
        "nonzero": MISSING if count is None else f"{count:,}",
        "sparsity": MISSING if sparsity is None else format_percent(sparsity, 1),
        "macs": MISSING if macs is None else f"{macs:,}",
        "bytes": f"{file.size_bytes:,}" if file else MISSING,
        "seconds": MISSING if seconds is None else f"{seconds:.1f}",
        "note": note,
    }


def _is_main(name: str) -> bool:
    return name.rpartition(".")[2] in MAIN_METRICS


def _kernel_rows(run: Run) -> list[dict[str, Any]]:
    """Return what each exported file holds by kernel, the largest first."""
    rows = []
    for point in run.points:
        if point.result.format == "keras":
            continue
        for kernel in point.result.size.kernels:
            size = 1
            for axis in kernel.shape:
                size *= axis
            rows.append(
                {
                    "file": point.result.file,
                    "name": kernel.name,
                    "shape": " x ".join(map(str, kernel.shape)),
                    "weights": size,
                    "bytes": (size * kernel.bits + 7) // 8,
                    "zeros": kernel.zeros / size if size else 0.0,
                    "distinct": kernel.distinct,
                }
            )
    rows.sort(key=lambda row: -row["bytes"])
    most = rows[0]["bytes"] if rows else 1
    return [
        {
            **row,
            "share": f"{100 * row['bytes'] / most:.1f}",
            "weights": f"{row['weights']:,}",
            "bytes": f"{row['bytes']:,}",
            "zeros": format_percent(row["zeros"], 1),
            "distinct": f"{row['distinct']:,}",
        }
        for row in rows[:_MOST_KERNELS]
    ]


def _layer_rows(run: Run) -> list[dict[str, str]]:
    """Return the layers of quantized files, those with the largest error first."""
    layers = [(file, layer) for file, errors in run.manifest.layer_errors.items() for layer in errors]
    layers = [(file, layer) for file, layer in layers if layer.sqnr_db is not None]
    layers.sort(key=lambda pair: pair[1].sqnr_db)
    return [
        {
            "file": file,
            "name": layer.layer,
            "kind": layer.kind,
            "sqnr": f"{layer.sqnr_db:.1f}",
            "cosine": MISSING if layer.cosine is None else f"{layer.cosine:.4f}",
        }
        for file, layer in layers[:_MOST_KERNELS]
    ]


def _environment(run: Run) -> list[tuple[str, str]]:
    rows = []
    if run.manifest.benchmark:
        about = run.manifest.benchmark.environment
        rows += [
            ("processor", about.cpu or MISSING),
            ("cores", str(len(about.affinity))),
            ("system", about.os),
            ("Python", about.python),
            ("fingerprint", about.fingerprint_id),
            ("load before and after", f"{about.load_before} and {about.load_after}"),
        ]
    rows += [("backend", run.manifest.backend)] if run.manifest.backend else []
    return rows + sorted(run.manifest.versions.items())
