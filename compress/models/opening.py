"""Opening a user's `.keras` file: checked before anything in it is built, executed or imported."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any

import keras

from compress.errors import ModelError
from compress.files import sha256_of
from compress.models.archive import check_archive, read_archive
from compress.models.gatekeeper import OWN_CLASSES, is_torch_optimizer

logger = logging.getLogger(__name__)

_trusted: ContextVar[tuple[str, ...]] = ContextVar("trusted_packages", default=())


@contextmanager
def trust_packages(packages: tuple[str, ...]) -> Iterator[None]:
    """Let model files opened inside the block name classes of these top-level packages, which are then imported."""
    token = _trusted.set((*_trusted.get(), *packages))
    try:
        yield
    finally:
        _trusted.reset(token)


def load_model(path: str | Path, *, allow_imports: tuple[str, ...] = (), sha256: str | None = None) -> keras.Model:
    """Return the Keras model in the file `path`.

    Args:
        path: a `.keras` file.
        allow_imports: top-level packages whose classes the file may name; they are imported.
        sha256: the digest that the file must have, or `None`.

    Raises:
        ModelError: the file is missing, corrupt, unsafe, holds NaN, or is another file than `sha256` says.
    """
    path = Path(path)
    packages = (*_trusted.get(), *allow_imports)
    with read_archive(path) as archive:
        check_archive(archive, allow_imports=packages)
        config, saved_by = archive.config, archive.metadata.get("keras_version", "unknown")
    if sha256 is not None and (found := sha256_of(path)) != sha256.lower():
        raise ModelError(f"{path} is another file than the recipe pins. Received: sha256 {found}, expected {sha256}")
    options = {"custom_objects": _custom_objects(path, config, packages), "safe_mode": True}
    try:
        with warnings.catch_warnings():
            # Optimizer state is of no use here: passes train with an optimizer of their own.
            warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
            return keras.saving.load_model(path, **options)
    except Exception as error:  # Keras raises many types; each means that this file cannot be opened as it is
        if config.get("compile_config"):
            with suppress(Exception):
                model = keras.saving.load_model(path, compile=False, **options)
                logger.warning("%s: its loss or metrics cannot be restored and are inferred instead", path)
                return model
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{path}: Keras {keras.__version__} cannot open it (saved by Keras {saved_by}): "
            f"{type(error).__name__}: {reason}",
            "Open it with the Keras that saved it, and save it again.",
        ) from error


def _custom_objects(path: Path, config: dict[str, Any], packages: tuple[str, ...]) -> dict[str, Any]:
    """Import what the file names from trusted packages, so that Keras finds it registered or by its name."""
    found: dict[str, Any] = {}
    for module, name in sorted(_named_objects(config)):
        if OWN_CLASSES.get(name) == module:
            import_module(module)  # registers the class
        if is_torch_optimizer(name, module):
            found[name] = getattr(keras.optimizers, name)  # that module needs PyTorch
        if module.partition(".")[0] in packages:
            try:
                found[name] = getattr(import_module(module), name)
            except (ImportError, AttributeError) as error:
                raise ModelError(f"{path}: {module}.{name} cannot be imported: {error}") from error
    return found


def _named_objects(node: Any) -> set[tuple[str, str]]:
    """Return every `(module, name)` that a config mentions."""
    if isinstance(node, list):
        return set().union(*map(_named_objects, node))
    if not isinstance(node, dict):
        return set()
    named = set().union(*map(_named_objects, node.values()))
    if isinstance(node.get("module"), str) and isinstance(node.get("class_name"), str):
        name = node["config"] if node["class_name"] == "function" else node["class_name"]
        named.add((node["module"], str(name)))
    return named
