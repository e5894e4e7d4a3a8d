"""Shared fixtures: a small real DiT on disk, and a bundle compiled of it, once per session."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.calibrate import calibrate
from ditcast.export import to_onnx
from ditcast.models import LoadedModel, load
from ditcast.models.base import describe

CLASSES = 5
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 2,
    "sample_size": 16,
    "patch_size": 4,
    "num_embeds_ada_norm": CLASSES,
}
torch.set_num_threads(1)  # on busy cores the threads of a tiny model only wait for each other
RECIPE: dict[str, Any] = {"steps": 6, "interval": 2, "samples": 4, "batch": 2}


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers directory with a seeded, untrained DiT of 5 classes and 16x16 RGB samples."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    DiTTransformer2DModel(**TINY).save_pretrained(folder / "transformer")
    DDPMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    names = [f"class-{i}" for i in range(CLASSES)]
    (folder / "classes.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> LoadedModel:
    """The same model, loaded."""
    return load(str(tiny_dir))


def make_bundle(model: LoadedModel, path: Path, **keys: Any) -> Bundle:
    """Calibrate and export a model into `path`, without measuring."""
    bundle = Bundle.create(path, describe(model, recipes.make(RECIPE | keys)))
    calibrate(bundle, model)
    to_onnx(bundle, model)
    return bundle


@pytest.fixture(scope="session")
def shared_bundle(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A W8A8 bundle with FORA at interval 2; never write to it."""
    return make_bundle(tiny, tmp_path_factory.mktemp("bundles") / "tiny.bundle")


@pytest.fixture
def bundle(shared_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy of the shared bundle that a test may damage."""
    shutil.copytree(shared_bundle.path, tmp_path / "tiny.bundle")
    return Bundle.open(tmp_path / "tiny.bundle")


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def ditcast() -> Run:
    """Run the command line in a fresh process, as a user does."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ditcast", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)

    return run
