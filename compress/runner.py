"""Recipe -> run directory: passes in order, exports, benchmark, budgets; whatever is finished is never done twice.

A step's key is a digest of everything that decides its result: its options, the content of the model before it, the
data, the seed and the versions that compute. A run that was killed skips the longest prefix of steps whose
keys and files still match, and ends with the same model, bit for bit on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras

from compress import __version__
from compress.data.split import map_arrays
from compress.deploy.exporting import export_models
from compress.deploy.records import ExportRecord
from compress.errors import BmcompressError, PassError
from compress.files import atomic_path, sha256_of
from compress.gate.judging import judge
from compress.gate.verdicts import raise_for_verdicts
from compress.manifest import FILE_NAME, FileDigest, Manifest, StepRecord
from compress.measure.benchmarking import benchmark_files
from compress.measure.comparing import compare_models
from compress.measure.comparison import LayerError
from compress.measure.in_process import measure_model
from compress.measure.size import measure_size
from compress.models.digest import compile_digest, content_digest
from compress.models.inspection import inspect_model
from compress.models.opening import load_model, trust_packages
from compress.passes.base import Pass
from compress.plan import FINAL_MODEL, INPUT, baseline_files, export_files, run_directory, step_file
from compress.preparation import Inputs, prepare_inputs
from compress.quantization.deployment import is_fake_quantized
from compress.quantization.restoration import end_layers
from compress.recipe import Recipe, load_recipe
from compress.restoring import restore_until_held
from compress.run_directory import open_run_directory
from compress.run_result import Run
from compress.survival import describe_survival, read_structure, require_in_file, require_kept
from compress.tracking.callback import EpochCurves
from compress.tracking.curves import file_curves, pass_curves
from compress.tracking.recorder import open_recorder
from compress.training.fitting import observed_by

logger = logging.getLogger(__name__)

_LAYER_SAMPLES = 64  # enough for the error of a layer, which is a mean over all of its values
_COMPUTING_PACKAGES = ("keras", "tensorflow", "numpy")


def run(
    recipe: str | Path | dict | Recipe,
    directory: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    allow_imports: tuple[str, ...] = (),
    fresh: bool = False,
    raise_on_broken_budget: bool = True,
) -> Run:
    """Run a recipe and return what it did and measured.

    Args:
        recipe: a YAML file, a mapping, or a `Recipe`.
        directory: the run directory, continued if it holds an earlier run; by default one under `runs/`.
        overrides: settings such as `"passes.prune.sparsity=0.8"`.
        allow_imports: top-level packages that model and data may import.
        fresh: do every step anew.
        raise_on_broken_budget: raise BudgetError at the end if a budget is broken.

    Raises:
        BmcompressError: of the class that tells what went wrong; what was finished is kept.
    """
    loaded = load_recipe(recipe, overrides)
    with trust_packages(allow_imports):
        inputs = prepare_inputs(loaded, allow_imports)
        with open_run_directory(run_directory(loaded, directory)) as path:
            manifest = _Runner(inputs, path, fresh).run()
    if raise_on_broken_budget:
        raise_for_verdicts(manifest.verdicts)
    return Run(path, manifest)


class _Runner:
    """One run of one recipe in one locked directory."""

    def __init__(self, inputs: Inputs, directory: Path, fresh: bool):
        self.inputs, self.recipe, self.directory = inputs, inputs.recipe, directory
        self.data, self.task = inputs.data, inputs.task
        self.earlier = None if fresh else Manifest.load(directory)
        self.recorder = open_recorder(self.recipe.tracking, directory)
        splits = (self.data.train, self.data.validation, self.data.test, self.data.unlabelled)
        self.manifest = Manifest(
            name=self.recipe.name,
            seed=self.recipe.seed,
            recipe_digest=self.recipe.digest(),
            backend=f"{keras.backend.backend()} {version(keras.backend.backend())}",
            versions=_versions(),
            data={split.name: split.digest for split in splits if split},
            notes=list(inputs.notes),
        )
        if self.earlier:
            self.manifest.steps = self.earlier.steps
            self.manifest.exports, self.manifest.exports_key = self.earlier.exports, self.earlier.exports_key

    def run(self) -> Manifest:
        self.recorder.start(self.recipe.name, self.recipe.to_dict())
        try:
            self._take_input()
            final = self._run_passes()
            self._keep(FINAL_MODEL, lambda path: shutil.copyfile(final, path))
            self._export()
            self._benchmark()
            self._finish("done")
        except BmcompressError as error:
            self._finish("failed", error=str(error))
            raise
        finally:
            self.recorder.end(succeeded=self.manifest.status == "done")
        return self.manifest

    # The input -------------------------------------------------------------------------------------------------

    def _take_input(self) -> None:
        """Copy recipe and input model into the run, so that it stays whole when the originals change."""
        self._keep("recipe.yaml", lambda path: path.write_text(self.recipe.to_yaml()))
        source, target = Path(self.recipe.model.path), self.directory / f"{INPUT}.keras"
        if not target.exists() or sha256_of(target) != sha256_of(source):
            self._keep(target.name, lambda path: shutil.copyfile(source, path))
        self.manifest.input = _digest_file(target, content_digest(target))
        self.manifest.input_statistics = _statistics(target)
        if self.recipe.passes:
            self.manifest.input_metrics = self._metrics(self.inputs.model)
        self.recorder.log(pass_curves(self.manifest.input_metrics), 0)
        self._save()

    # The passes ------------------------------------------------------------------------------------------------

    def _run_passes(self) -> Path:
        """Run or skip every pass and return the file of the final model."""
        before = self.manifest.input
        metrics = self.manifest.input_metrics
        done: list[StepRecord] = []
        earlier = list(self.earlier.steps) if self.earlier else []
        for position, item in enumerate(self.inputs.passes):
            key = self._step_key(item, before)
            known = earlier.pop(0) if earlier else None
            if known and known.key == key and _unchanged(self.directory, known.file):
                logger.info("%s: already done", item.id)
                done.append(known)
            else:
                earlier = []  # what was computed from the old step is old too
                done.append(self._run_pass(item, position, key, before, metrics))
            self.manifest.steps = [*done, *earlier]  # if this run is killed, the next one still finds the rest
            self._save()
            before, metrics = done[-1].file, done[-1].metrics
            self.recorder.log(pass_curves(metrics), len(done))
        self.manifest.steps = done
        return self.directory / before.path

    def _step_key(self, item: Pass, before: FileDigest) -> str:
        parts = {
            "options": item.model_dump(mode="json"),
            "model": before.content,
            "compiled": compile_digest(self.directory / f"{INPUT}.keras"),  # its loss is what passes train on
            "data": self.manifest.data,
            "seed": self.recipe.seed,
            "backend": self.manifest.backend,
            "versions": {name: self.manifest.versions[name] for name in ("bmcompress", *_COMPUTING_PACKAGES)},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _run_pass(
        self, item: Pass, position: int, key: str, before: FileDigest, metrics: dict[str, float]
    ) -> StepRecord:
        # Each step starts from the file, as a resumed run does, and from a seed of its own.
        model = load_model(self.directory / before.path)
        keras.utils.set_random_seed(_step_seed(self.recipe.seed, item.id))
        logger.info("%s: %s (pass %d of %d)", item.id, item.type, position + 1, len(self.inputs.passes))
        began = time.monotonic()
        try:
            with observed_by(EpochCurves(self.recorder, item.id)):
                result = item(model, self.data)
        except PassError as error:
            self._keep_last_good(error, item, position)
            raise
        if not item.changes_structure:
            require_kept(read_structure(model), read_structure(result), item.id)
        notes: list[str] = []
        if item.max_drop is not None and item.on_fail == "restore":
            result, notes = self._hold(item, model, result, metrics)
        name = step_file(self.recipe, position)
        self._keep(name, result.save)
        measured = self._metrics(result)
        seconds = time.monotonic() - began
        file = _digest_file(self.directory / name, content_digest(self.directory / name))
        reverted = False
        if not notes:
            reverted, notes = self._gate(item, metrics, measured)
        if not reverted:
            left_out = item.notes(result)
            notes += left_out
            for note in left_out:
                logger.info("%s: %s", item.id, note)
        if file.content == before.content:
            notes.append("the pass changed nothing")
            logger.warning("%s: the pass changed nothing", item.id)
        return StepRecord(
            id=item.id,
            type=item.type,
            options=item.model_dump(mode="json"),
            key=key,
            file=before if reverted else file,
            seconds=round(seconds, 3),
            statistics=_statistics(self.directory / (before.path if reverted else name)),
            metrics=metrics if reverted else measured,
            reverted=reverted,
            notes=notes,
            record={} if reverted else item.record(),
        )

    def _hold(
        self, item: Pass, source: keras.Model, model: keras.Model, before: dict[str, float]
    ) -> tuple[keras.Model, list[str]]:
        """Return `model`, made of `source` by `item`, with as many layers in float as `max_drop` takes, and a note."""
        name = _primary_metric(item, before)
        files = export_files(self.recipe) or {"tflite": "model.tflite"}

        def export(candidate: keras.Model, folder: Path) -> list[Path]:
            records = self._export_model(candidate, files, folder)
            return [folder / record.path for record in records]

        held = restore_until_held(
            model,
            metric=name,
            before=before[name],
            max_drop=item.max_drop,
            order=lambda: item.sensitive_layers(model, self.data),
            without=lambda paths: item.without(paths, model, source, self.data),
            keep=end_layers(model) if any(export.io != "float32" for export in self.recipe.exports) else (),
            export=export,
            test=self.data.test,
            task=self.task,
        )
        restored = f"; back to float: {', '.join(held.layers)}" if held.layers else ""
        sentence = f"{item.id}: on the files {name} falls by {100 * held.drop:.2f} pp, allowed are "
        sentence += f"{100 * item.max_drop:g} pp{restored}"
        logger.info("%s", sentence)
        return held.model, [sentence]

    def _gate(self, item: Pass, before: dict[str, float], after: dict[str, float]) -> tuple[bool, list[str]]:
        """Apply the pass's `max_drop`; return whether the model before it is kept, and what to note."""
        if item.max_drop is None:
            return False, []
        name = _primary_metric(item, before)
        drop = before[name] - after[name]
        if drop <= item.max_drop:
            return False, []
        sentence = f"{item.id}: {name} fell by {100 * drop:.2f} pp, allowed are {100 * item.max_drop:g} pp"
        if item.on_fail == "stop":
            raise PassError(sentence, "Lower the compression, train longer, or set `on_fail: revert` or `warn`.")
        logger.warning(
            "%s: %s",
            sentence,
            "the model before this pass is kept" if item.on_fail == "revert" else "going on",
        )
        return item.on_fail == "revert", [sentence]

    def _keep_last_good(self, error: PassError, item: Pass, position: int) -> None:
        """Save the model as it was before training was lost, where the pass hands it over."""
        if error.model is not None:
            name = step_file(self.recipe, position).replace(".keras", ".last-good.keras")
            self._keep(name, error.model.save)
            error.help = f"{error.help or ''} The last good state is {self.directory / name}.".strip()

    # The files -------------------------------------------------------------------------------------------------

    def _export(self) -> None:
        files = export_files(self.recipe)
        if not files:
            return
        final = self.manifest.steps[-1].file if self.manifest.steps else self.manifest.input
        parts = [
            self.recipe.exports,
            final.content,
            self.manifest.input.content,
            self.manifest.data.get("test"),
            _versions(("tf2onnx", "tensorflow", "onnx")),
        ]
        key = hashlib.sha256(repr(parts).encode()).hexdigest()
        if self.manifest.exports_key == key and self._exports_unchanged(files):
            logger.info("export: already done")
            return
        final = load_model(self.directory / FINAL_MODEL)
        records = self._export_model(final, files, self.directory)
        baselines = baseline_files(self.recipe)
        if baselines:
            records += self._export_model(load_model(self.directory / f"{INPUT}.keras"), baselines, self.directory)
        self._check_structure(final, files)
        self.manifest.exports, self.manifest.exports_key = records, key
        self._say(*(note for record in records for note in record.notes))
        self._save()

    def _check_structure(self, model: keras.Model, files: dict[str, str]) -> None:
        """Raise ExportError unless the files have the zeros and clusters of `model`, and note what they have."""
        structure = read_structure(model)
        if not any(kernel.is_structured for kernel in structure):
            return
        for name in files.values():
            size, _ = measure_size(self.directory / name)
            require_in_file(structure, size, name)
            self._say(describe_survival(structure, size, name))

    def _export_model(self, model: keras.Model, files: dict[str, str], folder: Path) -> list[ExportRecord]:
        quantized = is_fake_quantized(model)
        by_settings: dict[tuple, dict[str, Path]] = {}
        for export in self.recipe.exports:
            # The input model is exported too, to compare with, and has no integers to take in.
            io = export.io if quantized else "float32"
            settings = (export.opset, io, export.weights, export.tolerance, export.sparse)
            by_settings.setdefault(settings, {})[export.format] = folder / files[export.format]
        records = []
        for (opset, io, weights, tolerance, sparse), paths in by_settings.items():
            records += export_models(
                model,
                paths,
                samples=self.data.test,
                opset=opset,
                io=io,
                weight_type=weights,
                tolerance=tolerance,
                sparse=sparse,
            )
        return records

    def _exports_unchanged(self, files: dict[str, str]) -> bool:
        known = {record.path: record.sha256 for record in self.manifest.exports}
        wanted = [*files.values(), *baseline_files(self.recipe).values()]
        paths = [self.directory / name for name in wanted]
        return all(p.exists() and known.get(p.name) == sha256_of(p) for p in paths)

    def _benchmark(self) -> None:
        """Measure every exported file, the input model beside them, and judge the budgets."""
        settings = self.recipe.benchmark
        baselines = {kind: self.directory / name for kind, name in baseline_files(self.recipe).items()}
        exports = {kind: self.directory / name for kind, name in export_files(self.recipe).items()}
        reference = self.directory / f"{INPUT}.keras"
        final = self.directory / FINAL_MODEL if self.recipe.passes else reference
        files = [Path(file.path) for file in settings.include] + [reference, final]
        files += [path for kind in exports for path in (baselines.get(kind), exports[kind]) if path]
        # Exports are what ships; timing Keras itself takes many starts of TensorFlow, and is done where a budget asks.
        timed = any(budget.artifact == "keras" and budget.latency for budget in self.recipe.budgets)
        report = benchmark_files(
            files,
            self.data.test,
            reference=reference,
            references={file: path for kind, path in baselines.items() for file in (path, exports[kind])},
            tasks=self.task.outputs if self.task else None,
            threads=settings.threads,
            batch=settings.batch,
            processes=settings.processes,
            pairs=settings.pairs,
            latency=settings.enabled,
            memory=settings.enabled,
            untimed=[] if timed else [path for path in files if path.suffix == ".keras"],
            allow_imports=self.inputs.allow_imports,
        )
        measured = {result.file: result for result in report.results}
        by_artifact = {kind: measured[str(path)] for kind, path in {**exports, "keras": final}.items()}
        self.manifest.benchmark = report.with_short_names()
        self.manifest.verdicts = judge(self.recipe.budgets, by_artifact)
        for result in report.results:
            self.recorder.log(file_curves(result), 0)
        if settings.enabled and is_fake_quantized(load_model(final)):
            self.manifest.layer_errors = self._measure_layers(reference, exports.values())

    def _measure_layers(self, reference: Path, files: Iterable[Path]) -> dict[str, list[LayerError]]:
        """Return how far each layer of each file is from the reference's; what cannot be compared is noted."""
        x = self.data.test.all()[0] if self.data.test else None
        samples = None if x is None else map_arrays(lambda array: array[:_LAYER_SAMPLES], x)
        found = {}
        for file in files:
            try:
                comparison = compare_models(
                    reference, file, samples, _LAYER_SAMPLES, allow_imports=self.inputs.allow_imports
                )
                found[file.name] = comparison.layers
            except BmcompressError as error:
                self._say(f"{file.name}: its layers could not be compared: {error.message}")
        return found

    # Records ---------------------------------------------------------------------------------------------------

    def _keep(self, name: str, write: Callable[[Path], Any]) -> None:
        with atomic_path(self.directory / name) as temporary:
            write(temporary)

    def _say(self, *sentences: str) -> None:
        for sentence in sentences:
            logger.info("%s", sentence)
        self.manifest.notes = [*self.manifest.notes, *sentences]

    def _metrics(self, model: keras.Model) -> dict[str, float]:
        return measure_model(model, self.data.test, self.task) if self.data.test else {}

    def _save(self) -> None:
        self.manifest.save(self.directory)

    def _finish(self, status: str, error: str | None = None) -> None:
        self.manifest.status, self.manifest.error = status, error
        self._save()
        for name in ("recipe.yaml", FILE_NAME, *(record.path for record in self.manifest.exports)):
            if (self.directory / name).exists():
                self.recorder.artifact(self.directory / name)


def _primary_metric(item: Pass, metrics: dict[str, float]) -> str:
    name = next((n for n in metrics if n.rpartition(".")[2] == "accuracy"), None)
    if name is None:
        raise PassError(f"{item.id}: max_drop needs labels to measure accuracy on, and the test split has none")
    return name


def _versions(
    names: Sequence[str] = (*_COMPUTING_PACKAGES, "tf2onnx", "onnx", "onnxruntime", "ai-edge-litert"),
) -> dict[str, str]:
    return {"bmcompress": __version__, **{name: version(name) for name in names}}


def _step_seed(seed: int, step: str) -> int:
    """Return a seed that depends on the step's id and not on its position: inserting a step leaves others alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:4]) % 2**31


def _statistics(path: Path) -> dict[str, Any]:
    summary = inspect_model(path)
    return {
        "parameters": summary.parameters,
        "nonzero_parameters": summary.nonzero,
        "sparsity": summary.kernel_sparsity or 0.0,
        "distinct_weights": summary.distinct,
        "kernels": [asdict(kernel) for layer in summary.layers for kernel in layer.kernels],
        "macs": summary.macs,
        "macs_partial": summary.macs_partial,
    }


def _digest_file(path: Path, content: str | None = None) -> FileDigest:
    return FileDigest(path=path.name, sha256=sha256_of(path), content=content, size_bytes=path.stat().st_size)


def _unchanged(directory: Path, known: FileDigest) -> bool:
    path = directory / known.path
    return path.exists() and sha256_of(path) == known.sha256
