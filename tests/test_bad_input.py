"""Every mistake a user can make: exit code 2, one line that helps, and nothing written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditcast.bundle import Bundle
from ditcast.manifest import FileEntry
from ditcast.settings import cores
from tests.bundles import Bomb, write_manifest
from tests.conftest import RECIPE, Cli

CONFIG = "model/transformer/config.json"
SCHEDULER = "model/scheduler/scheduler_config.json"
WEIGHTS = "model/transformer/diffusion_pytorch_model.safetensors"
COMPILE = ("compile", "model", "-o", "new")
SAMPLE = ("sample", "b", "-o", "out.png", "--labels")

Prepare = Callable[[], object]
Case = tuple[Prepare, tuple[object, ...], str]


@pytest.fixture
def place(
    tmp_path: Path, tiny_dir: Path, shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The working directory, with a good `model` and a good bundle `b` of it."""
    shutil.copytree(tiny_dir, tmp_path / "model")
    shutil.copytree(shared_bundle.path, tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder, with a hash of its content."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def nothing() -> None:
    """The model and the bundle are fine as they are."""


def write(name: str, text: str) -> Prepare:
    """Write a file."""
    return lambda: Path(name).write_text(text)


def change(name: str, **values: Any) -> Prepare:
    """Change keys of a JSON file."""
    return lambda: Path(name).write_text(json.dumps(json.loads(Path(name).read_text()) | values))


def flip(name: str) -> Prepare:
    """Flip a bit in the middle of a file."""

    def damage() -> None:
        content = bytearray(Path(name).read_bytes())
        content[len(content) // 2] ^= 1
        Path(name).write_bytes(content)

    return damage


def truncate(name: str) -> Prepare:
    """Cut a file in half."""
    return lambda: os.truncate(name, Path(name).stat().st_size // 2)


def list_file(name: str) -> Prepare:
    """Let the manifest, properly sealed, name one more file."""

    def damage() -> None:
        held = Bundle.open(Path("b")).manifest
        files = held.files | {name: FileEntry(size=1, sha256="0" * 64)}
        write_manifest(Path("b"), held.model_copy(update={"files": files}))

    return damage


def without_graphs() -> None:
    """Make the bundle one that was calibrated and not exported."""
    Bundle.open(Path("b")).commit({"graphs": ()}, replaces="graphs/")


def pickle_weights() -> None:
    """Put the weights into a pickle."""
    Path(WEIGHTS).unlink()
    Path("model/transformer/diffusion_pytorch_model.bin").write_bytes(
        pickle.dumps(Bomb("exploded"))
    )


def source_gone() -> None:
    """Let the bundle, calibrated but not exported, be of a model that is no longer there."""
    without_graphs()
    bundle = Bundle.open(Path("b"))
    bundle.commit({"model": bundle.manifest.model.model_copy(update={"source": "gone"})})


MODELS: dict[str, Case] = {
    "no model": (
        nothing,
        ("compile", "modle", "-o", "new"),
        "'modle' is neither 'emoji', 'random:S",
    ),
    "a folder without a model": (
        lambda: Path("empty").mkdir(),
        ("compile", "empty", "-o", "new"),
        "empty is no diffusers directory: .* expected transformer/ or unet/, and scheduler/",
    ),
    "an unknown shape": (
        nothing,
        ("compile", "random:dit-q-1", "-o", "new"),
        "unknown shape 'random:dit-q-1'; expected random:dit-s-2",
    ),
    "another architecture": (
        change(CONFIG, _class_name="UNet2DConditionModel"),
        COMPILE,
        "holds a UNet2DConditionModel in transformer/; supported: .*, UNet2DModel",
    ),
    "another scheduler": (
        change(SCHEDULER, _class_name="EulerDiscreteScheduler"),
        COMPILE,
        "EulerDiscreteScheduler is not supported; expected DDPMScheduler or DDIMScheduler",
    ),
    "an unknown scheduler key": (
        change(SCHEDULER, thresholding=True),
        COMPILE,
        "thresholding=True",
    ),
    "weights in a pickle": (
        pickle_weights,
        COMPILE,
        "a pickle .*which can run code, where .*safete",
    ),
    "damaged weights": (truncate(WEIGHTS), COMPILE, "the weights in .* cannot be loaded"),
    "weights of another config": (
        change(CONFIG, num_layers=3),
        COMPILE,
        "lack transformer_blocks.2",
    ),
    "names for other classes": (
        write("model/classes.json", "[]"),
        COMPILE,
        "has 0 names, expected 5",
    ),
    "the model of a bundle is gone": (
        source_gone,
        ("export", "b"),
        "model: 'gone' is neither",
    ),
}


RULES = "rules: [{pattern: 'blokcs.*', precision: w8a8}, {pattern: '*', precision: float}]"
WITH_RECIPE = (*COMPILE, "--recipe", "r.yaml")
RECIPES: dict[str, Case] = {
    "no steps": (nothing, (*COMPILE, "--steps", 0), "steps: got 0; input should be greater"),
    "steps in words": (nothing, (*COMPILE, "--steps", "many"), "'many' is not a valid int"),
    "more steps than trained": (
        nothing,
        (*COMPILE, "--steps", 1001),
        "got 1001, expected 1 to 1000",
    ),
    "an interval that is too long": (
        nothing,
        (*COMPILE, "--steps", 5, "--interval", 6),
        r"interval: got 6, expected at most the number of steps \(5\)",
    ),
    "an unknown sampler": (
        nothing,
        (*COMPILE, "--sampler", "euler"),
        "'euler' is not one of 'ddim'",
    ),
    "an unknown recipe key": (
        write("r.yaml", "stepz: 3"),
        WITH_RECIPE,
        "unknown key 'stepz'; expect",
    ),
    "a misspelt rule": (write("r.yaml", RULES), WITH_RECIPE, r"'blokcs.\*' decides no layer"),
    "a layer without a rule": (
        write("r.yaml", "rules: [{pattern: 'blocks.*', precision: w8a8}]"),
        WITH_RECIPE,
        "no rule matches layer 'final.proj'",
    ),
    "a recipe that is no YAML": (
        write("r.yaml", "steps: [1"),
        WITH_RECIPE,
        "r.yaml is not YAML: whil",
    ),
    "a recipe that is a picture": (
        lambda: Path("r.yaml").write_bytes(b"\x89PNG\r\n"),
        WITH_RECIPE,
        "r.yaml is not YAML",
    ),
    "no recipe": (nothing, WITH_RECIPE, "recipe: no file r.yaml"),
    "another bundle in the way": (
        nothing,
        ("compile", "model", "-o", "b", "--steps", 7),
        r"b holds another bundle: .*steps 6 \(asked for 7\).*; give another -o or remove it",
    ),
    "other files in the way": (
        nothing,
        ("compile", "model", "-o", "model"),
        "model holds other files",
    ),
    "a file in the way": (write("new", "mine"), COMPILE, "new is a file; give a directory to -o"),
    "a backend that is none, before the long work": (
        nothing,
        (*COMPILE, "--backend", "gpu"),
        "backend: unknown 'gpu'; expected one of onnxruntime",
    ),
    "no output": (nothing, ("compile", "model"), "Missing option '-o'"),
}

REQUESTS: dict[str, Case] = {
    "a label outside the classes": (nothing, (*SAMPLE, 5), "labels: got 5, expected 0 to 4"),
    "a negative label": (nothing, (*SAMPLE, -1), "labels: got -1, expected 0 to 4"),
    "an unknown class": (nothing, (*SAMPLE, "cat"), "got 'cat', .* or a name, such as class-0"),
    "a digit that is none": (nothing, (*SAMPLE, "³"), "labels: got '³', expected class numbers"),
    "no labels": (nothing, SAMPLE, "labels: got none, expected at least one"),
    "sampling no steps": (nothing, (*SAMPLE, 1, "--steps", 0), "steps: got 0, expected 1 to 1000"),
    "no steps uncached": (nothing, (*SAMPLE, 1, "--steps", 0, "--cache", "none"), "steps: got 0"),
    "steps below the interval": (nothing, (*SAMPLE, 1, "--steps", 1), "interval: got 2, expec"),
    "an unknown cache": (
        nothing,
        (*SAMPLE, 1, "--cache", "teacache"),
        "unknown policy 'teacache'; expe",
    ),
    "an unknown target": (
        nothing,
        (*SAMPLE, 1, "--target", "gpu"),
        "target 'gpu'; it has targets onn",
    ),
    "an unknown backend": (
        nothing,
        (*SAMPLE, 1, "--backend", "gpu"),
        "unknown 'gpu'; expected one of",
    ),
    "too many threads": (
        nothing,
        (*SAMPLE, 1, "--threads", cores() + 1),
        f"threads: got {cores() + 1}, expected 1 to {cores()}",
    ),
    "a negative guidance": (
        nothing,
        (*SAMPLE, 1, "--guidance", -2),
        "guidance: got -2.0, expected a",
    ),
    "a graph loop of other steps": (
        nothing,
        (*SAMPLE, 1, "--loop", "graph", "--steps", 4),
        "sampler.onnx holds the plan of steps 6; use --loop host",
    ),
    "no folder for the figures": (
        nothing,
        (*SAMPLE, 1, "--json", "no/figures.json"),
        "json: no folder no; create it first",
    ),
    "a .jpg": (
        nothing,
        ("sample", "b", "-o", "out.jpg", "--labels", 1),
        "got out.jpg, expected a name that ends in .png or .npy",
    ),
    "no folder for the output": (
        nothing,
        ("sample", "b", "-o", "no/out.png", "--labels", 1),
        "output: no folder no; create it first",
    ),
    "measuring no images": (nothing, ("bench", "b", "--images", 0), "0 is not in the range x>=1"),
    "measuring no steps": (
        nothing,
        ("bench", "b", "--steps", 0),
        "steps: got 0, expected 1 to 1000",
    ),
    "an unknown option": (nothing, (*SAMPLE, 1, "--size", 3), "No such option '?--size"),
    "an unknown command": (nothing, ("smaple", "b"), "No such command 'smaple'"),
}

BUNDLES: dict[str, Case] = {
    "no bundle": (
        nothing,
        ("sample", "c", "-o", "out.png", "--labels", 1),
        "no manifest.json in c; make a bundle with: ditcast compile MODEL -o c",
    ),
    "a file for a bundle": (
        write("f", ""),
        ("verify", "f"),
        "no manifest.json in f; make a bundle",
    ),
    "a bundle without graphs": (
        without_graphs,
        (*SAMPLE, 1),
        "b has no graphs yet; make them with: ditcast export b",
    ),
    "a flipped bit in the weights": (
        flip("b/graphs/onnxruntime/weights.data"),
        ("verify", "b"),
        "weights.data in b: SHA-256 differs from the manifest; .* compile it again",
    ),
    "a flipped bit in the manifest": (
        flip("b/manifest.json"),
        (*SAMPLE, 1),
        "manifest.json is damage",
    ),
    "a truncated graph": (
        truncate("b/graphs/onnxruntime/full.onnx"),
        (*SAMPLE, 1),
        "full.onnx in b: got .* bytes, expected .* bytes",
    ),
    "a file that nobody listed": (
        lambda: Path("b/golden/more.pkl").write_bytes(pickle.dumps(Bomb("exploded"))),
        ("verify", "b"),
        "golden/more.pkl in b is not in the manifest; remove it",
    ),
    "a name that climbs out": (
        list_file("../model/classes.json"),
        ("verify", "b"),
        "leads out of the",
    ),
    "an absolute name": (
        list_file("/etc/passwd"),
        (*SAMPLE, 1),
        "names '/etc/passwd', which leads ou",
    ),
    "a newer format": (
        change("b/manifest.json", format_version=9),
        ("inspect", "b"),
        "version 9, expe",
    ),
}

CASES = MODELS | RECIPES | REQUESTS | BUNDLES


@pytest.mark.parametrize(("prepare", "arguments", "match"), CASES.values(), ids=CASES.keys())
def test_a_mistake_is_one_line(
    cli: Cli, place: Path, prepare: Prepare, arguments: tuple[object, ...], match: str
) -> None:
    """What, got, expected, what to do; and everything is as it was."""
    prepare()
    before = snapshot(place)
    done = cli(*arguments)
    assert done.code == 2
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("ditcast: error: ")
    assert re.search(match, line), line
    assert snapshot(place) == before


def test_a_differing_bundle_is_named_key_by_key(cli: Cli, place: Path) -> None:
    """Only what differs, each with both values."""
    flags = [part for key, value in RECIPE.items() for part in (f"--{key}", value)]
    done = cli("calibrate", "model", "-o", "b", *flags, "--method", "mse", "--guidance", 3)
    assert done.code == 2
    assert "guidance 2.0 (asked for 3.0), method 'absmax' (asked for 'mse'); give" in done.err
    assert "steps" not in done.err
    assert place.is_dir()


def test_latents_have_no_picture(
    cli: Cli, other_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says how to keep them."""
    monkeypatch.chdir(tmp_path)
    done = cli("sample", other_bundle.path, "-o", "out.png", "--labels", 1)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert (
        "4 channels (latents without a decoder), a .png needs 3; write them with -o out" in done.err
    )
    assert not list(tmp_path.iterdir())


def test_a_mistake_from_a_fresh_process(ditcast: Callable[..., Any], place: Path) -> None:
    """Nothing of torch, diffusers or Python itself is printed either."""
    pickle_weights()
    before = snapshot(place)
    done = ditcast(*COMPILE, cwd=place)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("ditcast: error: model: ")
    assert snapshot(place) == before
