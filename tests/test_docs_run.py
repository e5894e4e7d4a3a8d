"""What README and guide show is run: all Python, and the commands of the base install.

Of the other commands `tests/test_docs.py` checks that they are taken. They are not run here since
they take minutes with their defaults (compile, calibrate, tune), or need a GPU (TensorRT) or a
server; tests of their own run them with small recipes.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel

from tests.conftest import TINY, Cli
from tests.test_docs import PAGES, ROOT, blocks

README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "guide.md"  # of its Python, one makes the bundle that others use


@pytest.fixture(scope="module", autouse=True)
def _place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder with what the examples name: an untrained model, and a bundle of it."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**TINY | {"num_embeds_ada_norm": 6})
    model.save_pretrained(folder / "path/to/pipeline/transformer")
    DDPMScheduler(clip_sample=False).save_pretrained(folder / "path/to/pipeline/scheduler")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(next(text for text in blocks(GUIDE, "python") if "Bundle.create" in text), {})
        yield


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for page in PAGES for text in blocks(page, "python")])
def test_python(text: str) -> None:
    """It runs; the one that makes the bundle finds it made."""
    exec(text, {})


@pytest.mark.slow
def test_commands_of_the_base_install(cli: Cli) -> None:
    """README's, one after the other; the gate may say what it likes of an untrained model."""
    block = next(text for text in blocks(README, "sh") if "ditcast verify" in text)
    commands = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert len(commands) == 9
    for name, *arguments in commands:
        if name == "compare":
            shutil.copytree("my.bundle", "other.bundle")
        found = cli(name, *arguments)
        assert found.code in ((0, 1) if name == "gate" else (0,)), found
