"""The model of the tests of export."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel

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
