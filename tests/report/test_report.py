"""The report: what is in it, that nothing in a file's name can act, and how it behaves in a browser."""

from __future__ import annotations

import json
import re
import shutil
import time

import pytest

from compress.cli import app
from compress.errors import UsageError
from compress.gate.verdicts import Verdict
from compress.manifest import FileDigest, Manifest, StepRecord
from compress.measure.comparison import LayerError
from compress.measure.environment import describe_environment
from compress.measure.results import BenchmarkReport, FileResult, FileSize, KernelSize, Latency, Metric, Tool
from compress.report.collecting import front, read_runs
from compress.report.page import write_report

HOSTILE = '</script><script>document.title = "owned"</script>'
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def _result(name: str, kind: str, accuracy: float | None, size: int, p50: float | None) -> FileResult:
    quality = None
    if accuracy is not None:
        metric = Metric(value=accuracy, n=1000, ci95=(accuracy - 0.02, accuracy + 0.02), higher_is_better=True)
        quality = {"accuracy": metric}
    latency = None
    if p50 is not None:
        times = {"p50_ms": p50, "p50_ci95_ms": (p50, p50), "p90_ms": p50, "p99_ms": None, "mean_ms": p50}
        more = {"min_ms": p50, "stdev_ms": 0.0, "throughput_samples_s": 1.0, "reference_p50_ms": p50, "ratio": 0.5}
        ends = {"ratio_ci95": (0.4, 0.6), "control_ratio": 1.0, "control_ci95": (0.99, 1.01)}
        noise = {"noisy": False, "noise_reason": None}
        latency = [
            Latency(threads=1, batch=1, reference="a", n=100, processes=3, **times, **more, **ends, **noise),
        ]
    kernels = [KernelSize(name=f"dense/{HOSTILE}", shape=(10, 20), zeros=50, distinct=9, distinct_in_channel=3, bits=4)]
    counts = {"parameters": 200, "nonzero_parameters": 150, "kernel_weights": 200, "nonzero_kernel_weights": 150}
    about = FileSize(
        file_bytes=size, gzip_bytes=size // 2, zstd_bytes=size // 2, **counts, sparsity=0.25, distinct_weights=9,
        kernels=kernels, macs=200, macs_partial=False,
    )  # fmt: skip
    return FileResult(
        file=name, format=kind, sha256="0" * 64, runtime=None, size=about, quality=quality, startup=None, memory=None,
        latency=latency, reasons={} if p50 else {"latency": "the runtime crashed"},
    )  # fmt: skip


def layer(sqnr):
    return LayerError(
        layer=f"conv/{HOSTILE}", kind="Conv2D", counterpart="c", shape=(1, 2), mse=0.1, sqnr_db=sqnr, cosine=0.99,
        drop_db=1.0,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path):
    def make(name: str, title: str = "net", results: bool = True):
        folder = tmp_path / name
        folder.mkdir()
        files = [
            _result("model.tflite", "tflite", 0.9, 20_000, 0.5),
            _result(f"{HOSTILE}.onnx", "onnx", 0.93, 40_000, 1.0),
            _result("slow.onnx", "onnx", 0.91, 60_000, 2.0),
            _result("broken.onnx", "onnx", None, 60_000, None),
        ]
        benchmark = BenchmarkReport(
            tool=Tool(version="1"), created="2026-11-24T00:00:00Z", environment=describe_environment((1,), {}, {}),
            reference="model.tflite", data=None, results=files, warnings=[f"note & <b>{HOSTILE}</b>"],
        )  # fmt: skip
        digest = FileDigest(path="01-prune.keras", sha256="0" * 64, size_bytes=123_456)
        step = StepRecord(
            id="prune", type="prune", options={}, key="k", file=digest, seconds=1.5, metrics={"accuracy": 0.91},
            statistics={"nonzero_parameters": 1234, "sparsity": 0.8, "macs": None},
        )  # fmt: skip
        verdict = {"artifact": "tflite", "limit": "file", "value": 20_000.0, "allowed": 10_000.0, "verdict": "fail"}
        manifest = Manifest(
            name=title, seed=1, recipe_digest="d", status="done", steps=[step], verdicts=[Verdict(**verdict)],
            benchmark=benchmark if results else None,
            layer_errors={"model.tflite": [layer(30.0), layer(12.5), layer(None)]} if results else {},
        )  # fmt: skip
        manifest.save(folder)
        (folder / "recipe.yaml").write_text(f"name: '{HOSTILE}'\n")
        return folder

    return make


def test_everything_is_in_one_file_and_escaped(run, tmp_path):
    page = write_report([run("one", title=HOSTILE)], tmp_path / "report.html")
    text = page.read_text()
    assert page.stat().st_size < 1_500_000
    assert HOSTILE not in text
    assert not re.search(r'<(script|link|img|iframe)[^>]+(src|href)="(?!data:)', text)
    own = text.rsplit("<body>", 1)[1]
    assert (
        "http"
        not in re.sub(r'<script type="application/json".*?</script>', "", own, flags=re.DOTALL).split("<script")[0]
    )
    for part in ("Budgets: 1 fail", "90.00 %", "20,000", "the runtime crashed", "1,234", "80.0 %", "25.0 %", "10 x 20"):
        assert part in text, part
    assert '<td>10 x 20</td><td class="n">200</td><td class="n">100</td>' in text  # 4 bits each
    assert text.index(">12.5<") < text.index(">30.0<")  # the layer with the largest error first
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data[0]["benchmark"]["results"][1]["file"] == f"{HOSTILE}.onnx"


def test_several_runs_and_runs_without_results(run, tmp_path):
    text = write_report([run("one"), run("two", results=False)], tmp_path / "report.html").read_text()
    assert text.count("<h2>") == 3
    assert "<th>run</th>" in text
    alone = write_report([tmp_path / "two"], tmp_path / "report.html").read_text()
    assert "Nothing was benchmarked." in alone
    assert "there is nothing to draw" in alone
    assert len(alone) < 100_000  # without charts there is no library either


def test_a_directory_that_is_no_run(tmp_path, run):
    with pytest.raises(UsageError, match=r"manifest\.json is not there"):
        read_runs([tmp_path])
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UsageError, match=r"manifest\.json cannot be read"):
        read_runs([tmp_path])


def test_front():
    points = [(1.0, 0.5), (2.0, 0.4), (2.0, 0.9), (3.0, 0.9), (4.0, 0.95)]
    assert front(points, higher_is_better=True) == [0, 2, 4]
    assert front([(1.0, 5.0), (2.0, 7.0), (3.0, 1.0)], higher_is_better=False) == [0, 2]


def test_command(run, tmp_path):
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, ["report", str(run("one")), "-o", str(tmp_path / "r.html")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "r.html").exists()


@pytest.mark.skipif(not (BROWSER and DRIVER), reason="Chromium and its driver are not installed")
def test_in_a_browser(run, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    page = write_report([run("one", title=HOSTILE), run("two")], tmp_path / "report.html")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "window-size=1100,1400", f"user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get(page.as_uri())
        chart = driver.find_element(By.ID, "chart-latency")

        def wait(condition, what):
            until = time.monotonic() + 60
            while not condition():
                assert time.monotonic() < until, what
                time.sleep(0.1)

        wait(lambda: driver.execute_script("return Bokeh.documents.length > 0 && Bokeh.documents[0].is_idle"), "drawn")
        wait(lambda: not driver.find_element(By.ID, "chart-size").is_displayed(), "one chart is shown")
        driver.save_screenshot(str(tmp_path / "light.png"))
        place = driver.execute_script(
            """
            const root = Bokeh.documents[0].roots().find(each => chart.contains(Bokeh.index.find_one_by_id(each.id).el));
            const view = Bokeh.index.find_one_by_id(root.id);
            const data = root.renderers.map(each => each.data_source.data).find(each => each.file);
            const frame = view.frame, box = view.el.getBoundingClientRect();
            return [box.left + frame.bbox.left + frame.x_scale.compute(data.cost[0]) - frame.bbox.left,
                    box.top + frame.bbox.top + frame.y_scale.compute(data.value[0]) - frame.bbox.top, data.file[0]];
            """.replace("chart.contains", "document.getElementById('chart-latency').contains")
        )
        actions = ActionChains(driver)
        actions.w3c_actions.pointer_action.move_to_location(round(place[0]), round(place[1]))
        actions.perform()
        texts = """
            const found = [];
            const visit = node => { for (const each of node.querySelectorAll("*")) {
                if (each.classList.contains("bk-Tooltip")) found.push(each.shadowRoot.textContent);
                if (each.shadowRoot) visit(each.shadowRoot); } };
            visit(document); return found.join(" ");
            """
        wait(lambda: place[2] in driver.execute_script(texts), "the tooltip names the file")
        assert "90.00 %" in driver.execute_script(texts)
        driver.find_element(By.CSS_SELECTOR, "input[value=size]").click()
        assert driver.find_element(By.ID, "chart-size").is_displayed()
        assert not chart.is_displayed()
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        )
        driver.save_screenshot(str(tmp_path / "dark.png"))
        paper = "return getComputedStyle(document.body).backgroundColor"
        assert driver.execute_script(paper) == "rgb(22, 24, 28)"
        assert "owned" not in driver.title.replace(HOSTILE, "")
        errors = [each for each in driver.get_log("browser") if each["level"] in ("SEVERE", "WARNING")]
        assert errors == []
        events = [json.loads(each["message"])["message"] for each in driver.get_log("performance")]
        asked = [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]
        assert page.as_uri() in asked
        assert [url for url in asked if url.startswith(("http", "ws"))] == []
    finally:
        driver.quit()
    for name in ("light", "dark"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
