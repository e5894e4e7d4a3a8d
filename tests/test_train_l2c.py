"""`tools/train_l2c.py`: pairs of steps, of which the second reuses what it was asked to."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ditcast import tensors
from ditcast.cache.learned import routed
from ditcast.models import LoadedModel

TOOL = Path(__file__).parents[1] / "tools" / "train_l2c.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of five classes in the size of the tiny model, one of them held out."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("l2c") / "data.npz"
    images = rng.integers(0, 256, (10, 16, 16, 3), np.uint8)
    np.savez(path, images=images, labels=np.arange(10) % 5, held_out=np.arange(10) == 3)
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The tool in a process of its own."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_second_steps_reuse_the_wanted_share(
    tiny: LoadedModel, tiny_dir: Path, data: Path, tmp_path: Path
) -> None:
    """The file is a router of this model; first steps of pairs compute everything."""
    out = tmp_path / "router.safetensors"
    keys = ("--data", data, "--steps", 6, "--reuse", 0.25, "--iterations", 12, "--batch", 2)
    done = run(tiny_dir, *keys, "-o", out)
    assert done.returncode == 0, done.stderr
    assert "reuses 25.0% of all slots" in done.stdout
    held, metadata = tensors.load(out)
    assert metadata["model"] == tiny.fingerprint
    mask = routed(held["router"]).mask
    assert mask is not None
    assert mask[::2].all()
    assert 1 - mask.mean() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reuse", 0.5), "reuse: got 0.5, expected a share between 0 and 0.5"),
        (("--steps", 5), "steps: got 5, expected an even number from 2"),
        (("--data", "nowhere.npz"), "data: no file nowhere.npz; make it with tools/emoji_dataset"),
        (("-o", "nowhere/r"), "output: no folder nowhere; create it first"),
    ],
)
def test_bad_arguments(
    data: Path,
    arguments: tuple[object, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line each, before the model is loaded."""
    monkeypatch.syspath_prepend(str(TOOL.parent))
    given = ["nothing", "--data", data, "-o", "r.safetensors", *arguments]
    monkeypatch.setattr(sys, "argv", ["train_l2c", *map(str, given)])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("train_l2c").main()
    assert message in capsys.readouterr().err
