"""Ranges per step, a quantized TIB and stored features in the encoding of OpenVINO, run by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ditcast.models import LoadedModel
from ditcast.runtime import Pipeline
from ditcast.runtime.backends import make_backend
from tests.conftest import make_bundle
from tests.export.test_schemes import LABELS, QUICK, SCHEMES, SEED, psnr_db, simulated

# Weights of 7 or 4 bits: integers that are exact in every runtime on every CPU.
NARROW: dict[str, dict[str, Any]] = {
    "a range per step": {"scheme": "w7a8"},
    "tib": {},
    "cache": {"scheme": "w7a8"},
}


@pytest.mark.parametrize("name", NARROW)
def test_samples_are_those_of_the_simulation(model: LoadedModel, tmp_path: Path, name: str) -> None:
    """And of ONNX Runtime's encoding; floats may be bfloat16, so not to the last bit."""
    targets, keys = ("onnxruntime", "openvino"), QUICK | SCHEMES[name] | NARROW[name]
    bundle = make_bundle(model, tmp_path / "b", targets, **keys)
    found = Pipeline(bundle, backend=make_backend("openvino")).sample(
        LABELS, seed=SEED, cache="none"
    )
    exact = Pipeline(bundle, target="reference").sample(LABELS, seed=SEED, cache="none")
    beside = Pipeline(bundle).sample(LABELS, seed=SEED, cache="none")
    for wanted in (simulated(model, bundle), beside):
        assert psnr_db(found, wanted) >= 40
        assert psnr_db(found, wanted) > psnr_db(found, exact) + 6
