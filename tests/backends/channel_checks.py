"""Channel pruning on every backend of Keras; run as backend_checks.py is. What it keeps is compared with TensorFlow's."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import compress

sys.path.insert(0, str(Path(__file__).parents[1] / "channels"))
from nets import NETS, randomise

NAMES = ("residual", "recurrent", "without_norm")


def kept_channels(name: str) -> dict[str, list[int]]:
    """Return what channel pruning keeps of a net whose weights are the same everywhere, by the order of the layers."""
    model = randomise(NETS[name]())
    random = np.random.default_rng(0)
    model.set_weights([random.normal(0, 0.3, w.shape) if w.ndim > 1 else w for w in model.get_weights()])
    pruned = compress.prune_channels(model, 0.5)
    assert pruned.difference < 1e-4
    return {str(index): kept for index, kept in enumerate(pruned.kept.values())}


@pytest.mark.parametrize("name", NAMES)
def test_the_law(name):
    Path(os.environ["BMCOMPRESS_SHARED"], f"kept-{name}.json").write_text(json.dumps(kept_channels(name)))
