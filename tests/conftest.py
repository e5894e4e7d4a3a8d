"""Shared fixtures: a small real DiT on disk, and a bundle compiled of it, once per session."""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.calibrate import calibrate, qparams
from ditcast.calibrate.qparams import QParams
from ditcast.cli import main
from ditcast.export import stage, to_onnx
from ditcast.export.trace import trace
from ditcast.models import LoadedModel, load
from ditcast.models.base import describe
from tests import unets
from tests.tracing import remembering

TOOLS = Path(__file__).parents[1] / "tools"
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
# What the tiny model is not: latents, with channels for a variance, other patches, no biases.
OTHER: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 1,
    "patch_size": 2,
    "sample_size": 8,
    "out_channels": 8,
    "activation_fn": "gelu",
    "attention_bias": False,
}
OTHER_SCHEDULER: dict[str, Any] = {
    "prediction_type": "v_prediction",
    "beta_schedule": "scaled_linear",
}
torch.set_num_threads(1)  # on busy cores the threads of a tiny model only wait for each other
RECIPE: dict[str, Any] = {"steps": 6, "interval": 2, "samples": 4, "batch": 2}
RECIPE |= {"cache": "fora", "order": 1}


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled graphs of tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITCAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _imports_are_kept() -> None:
    """No collection looks at the many objects of torch's modules again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Equal modules are traced once in all workers, by a table of operators that is read once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traces"
    folder.mkdir(exist_ok=True)
    apis = importlib.import_module("torch.onnx._internal._lazy_import").onnxscript_apis
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "trace", remembering(trace, folder))
        patch.setattr(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops))
        yield


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


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tiny model with one block: tracing is what takes long."""
    folder = tmp_path_factory.mktemp("one")
    torch.manual_seed(0)
    DiTTransformer2DModel(**(TINY | {"num_layers": 1})).save_pretrained(folder / "transformer")
    DDPMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    return load(str(folder))


def calibrated(model: LoadedModel, path: Path, keys: dict[str, Any]) -> QParams:
    """What calibration finds by a recipe of these keys."""
    bundle = Bundle.create(path, describe(model, recipes.make(keys)))
    calibrate(bundle, model)
    assert bundle.manifest.quantization is not None
    return qparams.of_bundle(bundle)


def make_bundle(
    model: LoadedModel, path: Path, targets: Sequence[str] = ("onnxruntime",), **keys: Any
) -> Bundle:
    """Calibrate and export a model into `path`, without measuring."""
    bundle = Bundle.create(path, describe(model, recipes.make(RECIPE | keys)))
    calibrate(bundle, model)
    to_onnx(bundle, model, targets)
    return bundle


@pytest.fixture(scope="session")
def shared_bundle(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A W8A8 bundle with FORA at interval 2; never write to it."""
    return make_bundle(tiny, tmp_path_factory.mktemp("bundles") / "tiny.bundle")


@pytest.fixture(scope="session")
def narrow_bundle(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same in W7A8, which is exact in every runtime on every CPU; for both CPU targets."""
    path = tmp_path_factory.mktemp("narrow") / "narrow.bundle"
    return make_bundle(tiny, path, ("onnxruntime", "openvino"), scheme="w7a8")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Another model, which predicts velocities and a variance."""
    folder = tmp_path_factory.mktemp("other-model")
    torch.manual_seed(3)
    DiTTransformer2DModel(**(TINY | OTHER)).save_pretrained(folder / "transformer")
    DDPMScheduler(**OTHER_SCHEDULER).save_pretrained(folder / "scheduler")
    return load(str(folder))


@pytest.fixture(scope="session")
def other_bundle(other: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of the other model, DDPM with caching at interval 3; never write to it."""
    keys: dict[str, Any] = {"sampler": "ddpm", "interval": 3, "guidance": 1.5, "method": "mse"}
    return make_bundle(other, tmp_path_factory.mktemp("other") / "other.bundle", **keys)


@pytest.fixture(scope="session")
def typed_bundle(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The W8A8 bundle with the graphs of TensorRT too; never write to it."""
    path = tmp_path_factory.mktemp("typed") / "typed.bundle"
    return make_bundle(tiny, path, ("onnxruntime", "tensorrt"))


@pytest.fixture(scope="session")
def blocks_bundle(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A W4A8 bundle, whose layers TensorRT has with float inputs; never write to it."""
    path = tmp_path_factory.mktemp("blocks") / "blocks.bundle"
    return make_bundle(tiny, path, ("tensorrt",), scheme="w4a8")


@pytest.fixture(scope="session")
def fp8_bundle(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of 8-bit floats, which only TensorRT runs; never write to it."""
    path = tmp_path_factory.mktemp("fp8") / "fp8.bundle"
    return make_bundle(tiny, path, ("tensorrt",), scheme="fp8")


@pytest.fixture(scope="session")
def fp8_unet(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same of a class-conditional U-Net, whose layers are convolutions mostly."""
    folder = tmp_path_factory.mktemp("fp8-unet")
    model = unets.loaded(folder, unets.CLASSES, **unets.CONDITIONAL)
    return make_bundle(model, folder / "b", ("tensorrt",), scheme="fp8")


@pytest.fixture
def bundle(shared_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy of the shared bundle that a test may damage."""
    shutil.copytree(shared_bundle.path, tmp_path / "tiny.bundle")
    return Bundle.open(tmp_path / "tiny.bundle")


class Result(NamedTuple):
    """What a command did: exit code, standard output, standard error."""

    code: object
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process, which has torch loaded already."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["ditcast", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        return Result(exit_.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run a program of `tools/`, given by its name, in this process."""
    monkeypatch.syspath_prepend(str(TOOLS))

    def run(name: str, *arguments: object) -> Result:
        main = importlib.import_module(name).main
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfd.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        return Result(code, *capfd.readouterr())

    return run


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def ditcast() -> Run:
    """Run the command line in a fresh process, as a user does."""

    def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ditcast", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)

    return run
