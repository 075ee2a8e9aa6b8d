"""A digest of what a model computes: equal for two saves of one model, whose files differ in timestamps."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from compress.errors import ModelError
from compress.models.archive import Archive, read_archive
from compress.models.weight_store import WeightGroup

_VOLATILE = frozenset(("shared_object_id", "compile_config", "build_config", "build_input_shape"))

_TASK = ("loss", "loss_weights", "metrics", "weighted_metrics")


def content_digest(path: str | Path) -> str:
    """Return the sha256 over the architecture and the weights of a `.keras` file, as 64 hexadecimal digits.

    Optimizer state, compile options, random generators, timestamps and memory addresses do not count;
    names, shapes, dtypes, vocabularies and every bit of every weight do.

    Raises:
        ModelError: the file is missing or damaged.
    """
    with read_archive(path) as archive:
        try:
            return _digest(archive)
        except ModelError as error:
            raise ModelError(f"{path}: {error.message}", error.help) from None


def compile_digest(path: str | Path) -> str:
    """Return the sha256 over the losses and metrics that a `.keras` file was compiled with, without the optimizer."""
    with read_archive(path) as archive:
        given = archive.config.get("compile_config") or {}
        compiled = _canonical({key: given.get(key) for key in _TASK}, {})
    return hashlib.sha256(json.dumps(compiled, sort_keys=True).encode()).hexdigest()


def _digest(archive: Archive) -> str:
    digest = hashlib.sha256()
    config = _canonical(archive.config, {})
    digest.update(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    for group in _model_groups(archive.weights):
        for weight in group.weights:
            values = weight.read()
            digest.update(json.dumps([weight.path, weight.dtype, list(weight.shape)]).encode())
            digest.update(values.astype(values.dtype.newbyteorder("<"), order="C", copy=False).tobytes())
    for name in sorted(archive.assets):
        digest.update(json.dumps(["asset", name]).encode())
        digest.update(archive.read_asset(name))
    return digest.hexdigest()


def _canonical(node: Any, shared: dict[Any, int]) -> Any:
    """Return a config without what differs between two saves; addresses become orders of appearance."""
    if isinstance(node, list):
        return [_canonical(item, shared) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: _canonical(item, shared) for key, item in node.items() if key not in _VOLATILE}
    if str(node.get("class_name")).endswith("Policy"):
        return kept  # whether two layers share the policy object changes nothing
    if "shared_object_id" in node and isinstance(node.get("config"), dict) and "name" in node["config"]:
        kept["shared_object"] = shared.setdefault(node["shared_object_id"], len(shared))
    return kept


def _model_groups(root: WeightGroup) -> list[WeightGroup]:
    """Return every group but the optimizer's and those of random generators, sorted by path."""
    kept = [root]
    for key, child in root.children.items():
        if key != "optimizer":
            kept.extend(child.walk())
    counted = [group for group in kept if "seed_generator" not in group.path]
    return sorted(counted, key=lambda group: group.path)
