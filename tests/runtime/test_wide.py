"""A model wide enough that packed and unpacked weights are multiplied differently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel

from ditcast.bundle import Bundle
from ditcast.models import load
from ditcast.runtime.backends import graph_file, onnxruntime
from ditcast.runtime.pipeline import Pipeline
from ditcast.settings import Settings
from tests.conftest import TINY, make_bundle

WIDE: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 1}


@pytest.fixture(scope="module")
def wide_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(5)
    DiTTransformer2DModel(**(TINY | WIDE)).save_pretrained(folder / "transformer")
    DDPMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    return make_bundle(load(str(folder)), folder / "wide.bundle")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("target", ["reference", "onnxruntime"])
def test_both_loops_are_bit_identical(wide_bundle: Bundle, target: str, guidance: float) -> None:
    pipeline = Pipeline(wide_bundle, target=target)
    host = pipeline.sample([0, 3], seed=3, guidance=guidance)
    graph = pipeline.sample([0, 3], seed=3, guidance=guidance, loop="graph")
    assert np.array_equal(host, graph)


def test_only_large_weights_are_read_in_place(
    wide_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing the weights of DiT-XL/2 takes seconds; read in place, the last bits are others."""
    backend = onnxruntime.OnnxRuntimeBackend(Settings())
    file = graph_file(wide_bundle, "reference", "temporal")
    feeds = {
        "timesteps": np.arange(0, 1000, 50, dtype=np.float32),
        "class_labels": np.array([0, 1, 5]),
    }
    packed = backend.session(file).run(feeds, ["features"])["features"]
    monkeypatch.setattr(onnxruntime, "IN_PLACE_BYTES", Path(file.path).stat().st_size)
    read = backend.session(file).run(feeds, ["features"])["features"]
    assert not np.array_equal(read, packed)
    assert np.allclose(read, packed, atol=1e-5)
