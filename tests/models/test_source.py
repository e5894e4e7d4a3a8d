"""Where models come from, and every way in which a model directory can be wrong."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

from ditcast.errors import ConfigError, DitcastError, UnsupportedError
from ditcast.models import load, source
from ditcast.models.base import count
from ditcast.models.captions import Captions
from ditcast.models.dit import DiTAdapter
from ditcast.models.pixart import PixArtAdapter
from tests.bundles import Bomb
from tests.conftest import CLASSES, TINY

CONFIG = "transformer/config.json"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CUT = "transformer_blocks.0.ff.net.2.weight"

Damage = Callable[[Path], object]


@pytest.fixture
def folder(tiny_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    shutil.copytree(tiny_dir, tmp_path / "model")
    return tmp_path / "model"


def set_config(**values: Any) -> Damage:
    """Change keys of the transformer's config."""

    def damage(folder: Path) -> None:
        held = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(held | values))

    return damage


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change the tensors of the weights file."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return damage


def write(name: str, content: str) -> Damage:
    """Replace a file by text."""
    return lambda folder: (folder / name).write_text(content)


def cut_short(folder: Path) -> None:
    """Truncate the weights in the middle of the data."""
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_pickle_is_named_and_never_executed(folder: Path, tmp_path: Path) -> None:
    """Weights in a pickle are refused; beside safetensors a pickle is left alone."""
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(bomb)
    load(str(folder))
    (folder / WEIGHTS).unlink()
    with pytest.raises(
        UnsupportedError, match=r"a pickle \(diffusion_pytorch_model.bin\), which can"
    ):
        load(str(folder))
    (folder / WEIGHTS).write_bytes(bomb)  # disguised
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(str(folder))
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()  # it would have


CASES: dict[str, tuple[Damage, type[DitcastError], str]] = {
    "no transformer": (
        lambda folder: shutil.rmtree(folder / "transformer"),
        ConfigError,
        "no diffusers directory: cannot read transformer/config.json",
    ),
    "no scheduler": (
        lambda folder: shutil.rmtree(folder / "scheduler"),
        ConfigError,
        "cannot read scheduler/scheduler_config.json .FileNotFoundError.; expected transformer/",
    ),
    "config that is no JSON": (
        write(CONFIG, "{"),
        ConfigError,
        "cannot read transformer/config.json",
    ),
    "config that is a list": (
        write(CONFIG, "[]"),
        ConfigError,
        "holds list, expected a JSON object",
    ),
    "another architecture": (
        set_config(_class_name="SD3Transformer2DModel"),
        UnsupportedError,
        "holds a SD3Transformer2DModel in transformer/; supported: DiTTransformer2DModel",
    ),
    "a pipeline with a U-Net": (
        lambda folder: (
            shutil.move(folder / "transformer", folder / "unet"),
            write("unet/config.json", '{"_class_name": "UNet2DConditionModel"}')(folder),
        ),
        UnsupportedError,
        "holds a UNet2DConditionModel in unet/; supported: DiTTransformer2DModel",
    ),
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        UnsupportedError,
        r"has no weights where \*.safetensors belongs; save the model with",
    ),
    "truncated weights": (cut_short, ConfigError, "cannot be loaded .* save the model again"),
    "garbage for weights": (write(WEIGHTS, "garbage" * 99), ConfigError, "cannot be loaded"),
    "weights of another shape": (
        edit_weights(lambda tensors: tensors.update({CUT: torch.zeros(3, 256)})),
        ConfigError,
        f"cannot be loaded .*{CUT}",
    ),
    "a tensor missing": (
        edit_weights(lambda tensors: tensors.pop(CUT)),
        ConfigError,
        f"lack {CUT}",
    ),
    "a tensor too many": (
        edit_weights(lambda tensors: tensors.update(extra=torch.zeros(1))),
        ConfigError,
        "hold, beyond the config, extra",
    ),
    "more layers than weights": (
        set_config(num_layers=3),
        ConfigError,
        "lack transformer_blocks.2",
    ),
    "a layer count in words": (set_config(num_layers="two"), ConfigError, "cannot be loaded"),
    "no sample size": (set_config(sample_size=None), ConfigError, "cannot be loaded"),
    "names that are no JSON": (
        write("classes.json", "[1"),
        ConfigError,
        "classes.json is not JSON",
    ),
    "names that are no list": (
        write("classes.json", '{"a": 1}'),
        ConfigError,
        "holds dict, expected a list of names",
    ),
    "a name too few": (
        write("classes.json", '["a", "b", "c", "d"]'),
        ConfigError,
        "has 4 names, expected 5, one per class",
    ),
}


@pytest.mark.parametrize(("damage", "error", "match"), CASES.values(), ids=CASES.keys())
def test_a_bad_directory_says_what_is_wrong(
    folder: Path,
    damage: Damage,
    error: type[DitcastError],
    match: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One error of ours, and nothing else is printed."""
    damage(folder)
    capfd.readouterr()
    with pytest.raises(error, match=match):
        load(str(folder))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "no/such/place",
            r"'no/such/place' is neither 'emoji', 'random:SHAPE' \(dit-s-2, dit-xl-2, pixart",
        ),
        (
            "random:dit-xxl-9",
            "unknown shape 'random:dit-xxl-9'; expected random:dit-s-2, random:dit-x",
        ),
    ],
)
def test_an_unknown_model_lists_the_choices(name: str, match: str) -> None:
    """Neither a directory nor a name that is known."""
    with pytest.raises(ConfigError, match=match):
        load(name)


def test_a_good_directory(folder: Path) -> None:
    """Names, schedule and weights arrive; the fingerprint follows config and weights only."""
    first = load(str(folder))
    assert first.classes == tuple(f"class-{i}" for i in range(CLASSES))
    assert first.scheduler["clip_sample"] is False
    assert first.source == str(folder)
    (folder / "classes.json").unlink()
    second = load(str(folder))
    assert second.classes == ()
    assert second.fingerprint == first.fingerprint
    edit_weights(lambda tensors: tensors[CUT].add_(1))(folder)
    assert load(str(folder)).fingerprint != first.fingerprint


def test_the_embedded_model() -> None:
    """It needs no download: a class-conditional DiT on 32x32 pictures, its classes named."""
    model = load("emoji")
    assert model.source == "emoji"
    assert model.adapter.sample_shape == (3, 32, 32)
    assert len(set(model.classes)) == model.adapter.num_classes >= 10
    assert all(bool(torch.isfinite(p).all()) for p in model.adapter.denoiser.parameters())


def test_random_weights_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same shape is the same model in every process; other random draws are not disturbed."""
    monkeypatch.setitem(source.RANDOM, "tiny", TINY)
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    first = load("random:tiny")
    assert torch.rand(1) == wanted
    second = load("random:tiny")
    assert first.fingerprint == second.fingerprint
    weights = zip(
        first.adapter.denoiser.parameters(), second.adapter.denoiser.parameters(), strict=True
    )
    assert all(torch.equal(a, b) for a, b in weights)


@pytest.mark.parametrize(
    ("shape", "published", "position_embedding"),
    # The authors' models count the position embedding as a parameter and hold one set of
    # embedders, where diffusers has one per block: 33 M and 675 M (Peebles & Xie, table 1).
    [("dit-s-2", 32_963_360, 256 * 384), ("dit-xl-2", 675_129_632, 256 * 1152)],
)
def test_random_shapes_are_the_published_ones(
    shape: str, published: int, position_embedding: int
) -> None:
    """The number of parameters, counted without allocating them."""
    with torch.device("meta"):
        model = DiTTransformer2DModel(**source.RANDOM[shape])
        adapter = DiTAdapter(model)
    tib: Any = adapter.temporal
    found = count(adapter.denoiser, tib.modulation, tib.final, tib.time[0], tib.label[0])
    assert found + position_embedding == published


def test_the_random_pixart_is_the_published_one() -> None:
    """611 M parameters (PixArt-alpha: 0.6 B), each of them the diffusers model's."""
    config = dict(source.RANDOM["pixart-xl-2"])
    assert config.pop("_class_name") == PixArtAdapter.architecture
    with torch.device("meta"):
        model = PixArtTransformer2DModel(**config)
        table = Captions(torch.zeros(2, 3, 4096), torch.ones(2, 3, dtype=torch.bool))
        adapter = PixArtAdapter(model, captions=table)
    assert count(adapter.temporal, adapter.denoiser) == count(model) == 610_856_096
