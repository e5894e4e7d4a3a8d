"""What README and docs show is run: all Python, and every command that needs no GPU and no server.

Commands that take minutes with their defaults (compile, tune) run with fewer steps, rows and
images. Of the rest `tests/test_docs.py` checks that they are taken.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel

from ditcast.runtime import bench
from tests.conftest import TINY, Cli
from tests.test_docs import PAGES, ROOT, blocks, shown

README = ROOT / "README.md"
GUIDE = ROOT / "docs" / "guide.md"  # of its Python, one makes the bundle that others use

KEYS = {"steps": 6, "samples": 4, "batch": 2, "interval": 2, "images": 4}
SMALL = [f"--{key}={value}" for key, value in (KEYS | {"rows": 12, "iterations": 2}).items()]
FEWER = [*(f"--{key}={value}" for key, value in KEYS.items()), "--trials=2", "--scheme=w8a8"]
LONG = {"compile": SMALL, "tune": FEWER}


@pytest.fixture(scope="module", autouse=True)
def _place(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder with what the examples name: an untrained model, and a bundle of it.

    But for one more class it is the tiny model, whose step graphs are traced once.
    """
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**TINY | {"num_embeds_ada_norm": 6})
    tiny = DiTTransformer2DModel.from_pretrained(tiny_dir / "transformer").state_dict()
    same = {name: weight for name, weight in tiny.items() if "class_embedder" not in name}
    model.load_state_dict(same, strict=False)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        words
        for _, words in sorted({" ".join(w): w for w in shown("ditcast") if w[0] in LONG}.items())
    ],
    ids=" ".join,
)
def test_commands_that_take_minutes(
    cli: Cli, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small recipe, each where no other one has left a bundle; memory is not measured."""
    monkeypatch.setattr(bench, "_peak_memory_mib", lambda *arguments: 123.0)
    shutil.copytree("path", tmp_path / "path")
    monkeypatch.chdir(tmp_path)
    recipe = next(text for text in blocks(README, "yaml") if "rules:" in text)
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "tuned").mkdir()
    if "tuned/recipe.yaml" in words:
        (tmp_path / "tuned" / "recipe.yaml").write_text("scheme: w8a8\ncache: taylor\n")
    found = cli(*words, *LONG[words[0]])
    assert found.code == 0, found


@pytest.mark.slow
def test_engines_without_a_gpu(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that build and audit for other machines, behind the compile before them."""
    pytest.importorskip("tensorrt_rtx")
    shutil.copytree("path", tmp_path / "path")
    monkeypatch.chdir(tmp_path)
    rtx = [words for words in shown("ditcast") if "tensorrt-rtx" in words]
    assert {words[0] for words in rtx} == {"build", "audit"}
    for words in rtx:
        if not Path(words[1]).is_dir():
            (made,) = {
                tuple(w)
                for w in shown("ditcast")
                if w[0] == "compile" and "tensorrt" in w and words[1] in w
            }
            assert cli(*made, *SMALL).code == 0
        found = cli(*words)
        assert found.code == 0, found
