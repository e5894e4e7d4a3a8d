"""Exports that trace every graph once: tracing is what takes long."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel

from ditcast.calibrate.layers import QuantizedLayer
from ditcast.calibrate.simulate import QuantizedFeatures
from ditcast.export import stage
from ditcast.export.trace import trace
from ditcast.models import LoadedModel, load
from tests.conftest import TINY


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tiny model with one block: tracing is what takes long."""
    folder = tmp_path_factory.mktemp("one")
    torch.manual_seed(0)
    DiTTransformer2DModel(**(TINY | {"num_layers": 1})).save_pretrained(folder / "transformer")
    DDPMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    return load(str(folder))


@pytest.fixture(scope="session")
def traced() -> dict[str, Any]:
    """Step graphs by what they are made of."""
    return {}


def _identity(module: torch.nn.Module, arguments: Any, outputs: Any) -> str:
    """Equal for modules whose graphs differ at most in the weights that are quantized later."""
    structure = [[*outputs], [tuple(x.shape) for x in arguments]]
    for name, layer in module.named_modules():
        if isinstance(layer, QuantizedLayer):
            clipped = layer.scale if layer.bits < 8 else None  # its limits are in the graph
            structure.append([name, clipped, layer.rows is not None, layer.folded])
    digest = hashlib.sha256(repr(structure).encode())
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether these are no temporal features with something of calibration inside."""
    if not isinstance(module, QuantizedFeatures):
        return True
    held = module.qparams
    inside = any(name.startswith("temporal.") or s.stepwise for name, s in held.layers.items())
    return not (inside or held.balance or held.stored)


@pytest.fixture(scope="session")
def _remembering(traced: dict[str, Any]) -> Any:
    """`trace`, done once for each graph."""

    def remembered(module: Any, arguments: Any, **options: Any) -> Any:
        if not _is_plain(module):
            return trace(module, arguments, **options)
        key = _identity(module, arguments, options["outputs"])
        key += str(bool(getattr(getattr(module, "qparams", None), "layers", None)))
        if key not in traced:
            traced[key] = trace(module, arguments, **options)
        return traced[key]

    return remembered


@pytest.fixture
def quick(_remembering: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace no graph twice in one session."""
    monkeypatch.setattr(stage, "trace", _remembering)


@pytest.fixture(scope="module")
def quick_module(_remembering: Any) -> Iterator[None]:
    """The same for fixtures of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "trace", _remembering)
        yield
