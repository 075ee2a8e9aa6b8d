"""The GitHub action, the example workflow and the pre-commit hooks: valid, and their steps run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from gate_nets import write_net, write_samples

ROOT = Path(__file__).parent.parent.parent
ACTION, WORKFLOW = ROOT / "action.yml", ROOT / "recipes" / "ci" / "github-workflow.yml"
HOOKS = ROOT / ".pre-commit-hooks.yaml"

BUDGET = """\
artifacts: {tflite: build/model.tflite}
references: {tflite: base/model.tflite}
data: {test: {type: npz, path: data.npz, x: x_test, y: y_test}}
budgets:
  - artifact: tflite
    file: 1 MiB
    accuracy: {min: 80%}
    latency: {ratio: 3}
"""

FAKE_GH = """\
#!/usr/bin/env bash
echo "$@" >> "$CALLS"
case "$*" in *--jq*) cat "$COMMENTS" ;; esac
exit "${GH_FAILS:-0}"
"""


def execute(command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize(
    ("schema", "file"), [("vendor.github-workflows", WORKFLOW), ("vendor.github-actions", ACTION)], ids=["workflow", "action"]
)  # fmt: skip
def test_files_are_valid(schema, file):
    done = execute([sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(file)])
    assert done.returncode == 0, done.stdout
    rules = "{extends: default, rules: {line-length: {max: 120}, document-start: disable, truthy: {check-keys: false}, braces: {max-spaces-inside: 0}}}"
    done = execute([sys.executable, "-m", "yamllint", "--strict", "-d", rules, str(file)])
    assert done.returncode == 0, done.stdout
    for step in steps_of(file):
        script = step.get("run", "")
        assert "${{" not in script, "what a user gives must not be pasted into a script"
        assert execute(["bash", "-n"], input=script).returncode == 0


def steps_of(file: Path) -> list[dict]:
    document = yaml.safe_load(file.read_text())
    return document["runs"]["steps"] if "runs" in document else document["jobs"]["check"]["steps"]


class Job:
    """Runs steps as GitHub's runner does: bash with -eo pipefail, expressions filled in, outputs kept."""

    def __init__(self, folder: Path, environment: dict[str, str], values: dict[str, str]):
        self.folder, self.environment, self.values = folder, environment, values
        self.log, self.failed = "", False

    def fill(self, text: str, inputs: dict[str, str]) -> str:
        def value(found: re.Match) -> str:
            names = [name.strip() for name in found[1].split("||")]
            known = {**self.values, **{f"inputs.{name}": given for name, given in inputs.items()}}
            return next((known[name] for name in names if known.get(name)), "")

        return re.sub(r"\$\{\{(.*?)\}\}", value, text)

    def run(self, steps: list[dict], inputs: dict[str, str] | None = None) -> None:
        for step in steps:
            condition = step.get("if", "")
            if self.failed and "always()" not in condition:
                continue
            if step.get("uses", "").startswith("bmcompress/"):
                given = {name: entry["default"] for name, entry in yaml.safe_load(ACTION.read_text())["inputs"].items()}
                self.run(steps_of(ACTION), given | step["with"])
                self.values["steps.model.outputs.verdict"] = self.values.get("steps.check.outputs.verdict", "")
            elif "run" in step:
                self.run_script(step, inputs or {})

    def run_script(self, step: dict, inputs: dict[str, str]) -> None:
        output = self.folder / "output.txt"
        output.write_text("")
        own = {name: self.fill(value, inputs) for name, value in step.get("env", {}).items()}
        done = execute(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]], cwd=self.folder,
            env={**self.environment, **own, "GITHUB_OUTPUT": str(output)},
        )  # fmt: skip
        self.log += done.stdout + done.stderr
        self.failed = self.failed or done.returncode != 0
        for line in output.read_text().splitlines():
            name, _, value = line.partition("=")
            self.values[f"steps.{step.get('id')}.outputs.{name}"] = value


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A user's repository whose first commit holds a model, cloned from another one that is its origin."""
    folder = tmp_path_factory.mktemp("origin")
    (folder / "build").mkdir()
    # The workflow says .tflite; the runtime is told by the content of a file unless its name contradicts it.
    budget = BUDGET.replace("model.tflite", "model.onnx")
    (folder / "bmcompress.budget.yaml").write_text(budget)
    write_net(folder / "build" / "model.onnx", 0, 4)
    write_samples(folder / "data.npz", 500, (50, 60))
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], ["commit", "-qm", "model"]):
        execute(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=folder)
    execute(["git", "config", "uploadpack.allowAnySHA1InWant", "true"], cwd=folder)
    clone = tmp_path_factory.mktemp("clones") / "clone"
    execute(["git", "clone", "-q", str(folder), str(clone)])
    return clone


@pytest.fixture
def job(repository, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "gh").write_text(FAKE_GH)
    # Installing is what the gate does; here the installed program is the one that is tested.
    (tools / "python").write_text('#!/usr/bin/env bash\necho "python $*" >> "$CALLS"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (tmp_path / "comments").write_text("")
    environment = {
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path),
        "GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": str(repository), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "CALLS": str(tmp_path / "calls"), "COMMENTS": str(tmp_path / "comments"),
    }  # fmt: skip
    head = execute(["git", "rev-parse", "HEAD"], cwd=repository).stdout.strip()
    values = {
        "github.action_path": str(ROOT), "github.token": "t", "github.repository": "o/r", "github.event_name": "pull_request",
        "github.event.pull_request.number": "7", "github.event.pull_request.base.sha": head,
    }  # fmt: skip
    return Job(repository, environment, values)


def workflow_steps() -> list[dict]:
    return yaml.safe_load(WORKFLOW.read_text().replace("model.tflite", "model.onnx"))["jobs"]["check"]["steps"]


def test_the_workflow_runs_and_comments_once(job, tmp_path):
    job.run(workflow_steps())
    assert not job.failed, job.log
    assert "The verdict is pass." in job.log
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == f"python -m pip install --quiet {ROOT}"
    assert calls[-1] == "api --silent repos/o/r/issues/7/comments -F body=@bmcompress-check.md"
    assert (tmp_path / "summary.md").read_text().startswith("<!-- bmcompress:check -->\n### bmcompress check passed")
    assert json.loads((job.folder / "bmcompress-check.json").read_text())["verdict"] == "pass"
    assert (job.folder / "base" / "model.onnx").read_bytes() == (job.folder / "build" / "model.onnx").read_bytes()

    (tmp_path / "comments").write_text("41\n42\n")
    job.environment["GH_FAILS"] = "1"  # as in a fork's pull request
    comment = next(step for step in steps_of(ACTION) if step["name"] == "Comment")
    job.run([comment])
    assert "::warning::The comment could not be written" in job.log and not job.failed
    del job.environment["GH_FAILS"]
    job.run([comment])
    last = (tmp_path / "calls").read_text().splitlines()[-1]
    assert last == "api --silent --method PATCH repos/o/r/issues/comments/41 -F body=@bmcompress-check.md"


def test_the_workflow_fails_at_the_line_of_a_broken_limit(job, tmp_path):
    budget = job.folder / "bmcompress.budget.yaml"
    before = budget.read_text()
    budget.write_text(before.replace("1 MiB", "1 KiB"))
    try:
        job.run(workflow_steps())
    finally:
        budget.write_text(before)
    assert job.failed
    assert "::error file=bmcompress.budget.yaml,line=6,title=onnx%3A file::" in job.log.replace("tflite%3A", "onnx%3A")
    assert "The verdict is fail." in job.log


def test_the_hooks_are_valid_and_run(job, tmp_path):
    done = execute([sys.executable, "-m", "pre_commit", "validate-manifest", str(HOOKS)])
    assert done.returncode == 0, done.stdout
    hooks = {hook["id"]: hook for hook in yaml.safe_load(HOOKS.read_text())}
    recipe = tmp_path / "mine.bmcompress.yaml"
    shutil.copy(ROOT / "recipes" / "quickstart.yaml", recipe)
    assert re.search(hooks["bmcompress-recipe"]["files"], recipe.name)
    options = {"cwd": job.folder, "env": job.environment}
    assert execute([*hooks["bmcompress-recipe"]["entry"].split(), str(recipe)], **options).returncode == 0
    recipe.write_text("nonsense: 1\n")
    assert execute([*hooks["bmcompress-recipe"]["entry"].split(), str(recipe)], **options).returncode == 3
    assert re.search(hooks["bmcompress-size"]["files"], "build/model.tflite")
    assert not re.search(hooks["bmcompress-size"]["files"], "train.py")
    done = execute(hooks["bmcompress-size"]["entry"].split(), **options)
    assert done.returncode == 0, done.stderr
