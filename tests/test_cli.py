"""The command line: what scripts rely on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from PIL import Image

from ditcast import __version__
from ditcast.bundle import Bundle
from ditcast.errors import ParityError
from ditcast.options import join_labels, parse_labels
from ditcast.recipe import Recipe
from ditcast.runtime import Pipeline, bench
from ditcast.settings import Settings
from tests import bundles
from tests.conftest import RECIPE, Cli, Run

FLAGS = [part for key, value in RECIPE.items() for part in (f"--{key}", value)]


@pytest.fixture(scope="module")
def pipeline(shared_bundle: Bundle) -> Pipeline:
    """The W8A8 graphs of the tiny model."""
    return Pipeline(shared_bundle)


def test_a_picture_from_a_fresh_process(
    ditcast: Run, shared_bundle: Bundle, tmp_path: Path
) -> None:
    """Two classes side by side, twice as large, and the figures; nothing on standard error."""
    picture, figures = tmp_path / "out.png", tmp_path / "out.json"
    done = ditcast(
        *("sample", shared_bundle.path, "-o", picture, "--labels", 3, "class-1"),
        *("--seed", 4, "--scale", 2, "--threads", 1, "--json", figures),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{picture}: 2 images in ")
    with Image.open(picture) as image:
        assert image.size == (2 * (2 * 16 + 2), 2 * 16)
    values = json.loads(figures.read_text())
    assert values.keys() >= {"images", "seconds", "peak_memory_mib", "integer_mode"}
    assert (values["images"], values["backend"], values["threads"]) == (2, "onnxruntime", 1)
    assert values["onnxruntime"] == onnxruntime.__version__


def test_a_mistake_in_a_fresh_process(ditcast: Run, shared_bundle: Bundle, tmp_path: Path) -> None:
    """Exit code 2 and one line."""
    done = ditcast("sample", shared_bundle.path, "-o", tmp_path / "out.png", "--labels", 7)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ditcast: error: labels: got 7, expected 0 to 4\n"


def sampled(cli: Cli, bundle: Bundle, folder: Path, *arguments: object) -> NDArray[np.float32]:
    """The samples of a `sample` command that has to succeed."""
    done = cli("sample", bundle.path, "-o", folder / "out.npy", *arguments)
    assert (done.code, done.err) == (0, "")
    found: NDArray[np.float32] = np.load(folder / "out.npy")
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ("--labels", 3, 1),
        ("--labels", "3,1"),
        ("--labels=3,1",),
        ("--labels", "class-3", "class-1"),
        ("--labels", 3, "class-1", "--seed", 0),
        ("--seed", 0, "--labels", 3, 1, "--loop", "host"),
    ],
)
def test_ways_to_name_classes(
    cli: Cli, shared_bundle: Bundle, pipeline: Pipeline, tmp_path: Path, arguments: tuple[Any, ...]
) -> None:
    """Numbers or names, apart or joined, before or after other options."""
    found = sampled(cli, shared_bundle, tmp_path, *arguments)
    np.testing.assert_array_equal(found, pipeline.sample([3, 1]))


@pytest.mark.parametrize(
    ("arguments", "request_"),
    [
        (("--seed", 5), {"seed": 5}),
        (("--steps", 4), {"steps": 4}),
        (("--guidance", 1), {"guidance": 1.0}),
        (("--cache", "none"), {"cache": "none"}),
        (("--loop", "graph"), {"loop": "graph"}),
        (("--no-spin", "--low-memory", "--backend", "onnxruntime"), {}),
    ],
)
def test_requests_of_sample(
    cli: Cli,
    shared_bundle: Bundle,
    pipeline: Pipeline,
    tmp_path: Path,
    arguments: tuple[Any, ...],
    request_: dict[str, Any],
) -> None:
    """Each option is what the pipeline has under the same name."""
    found = sampled(cli, shared_bundle, tmp_path, "--labels", 2, *arguments)
    np.testing.assert_array_equal(found, pipeline.sample([2], **request_))


def test_options_that_change_no_picture_arrive(
    cli: Cli, shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How the machine is used, as the pipeline is told."""
    told: list[dict[str, Any]] = []

    class Watched(Pipeline):
        def __init__(self, bundle: Any, **options: Any) -> None:
            told.append(options)
            super().__init__(bundle, **options)

    monkeypatch.setattr("ditcast.runtime.Pipeline", Watched)
    sampled(
        cli, shared_bundle, tmp_path, "--labels", 1, "--no-spin", "--low-memory", "--threads", 1
    )
    sampled(cli, shared_bundle, tmp_path, "--labels", 1)
    assert [options["low_memory"] for options in told] == [True, False]
    assert [options["settings"] for options in told] == [
        Settings(threads=1, spin=False),
        Settings(),
    ]


def test_many_labels_go_in_batches_of_the_recipe(
    cli: Cli, shared_bundle: Bundle, pipeline: Pipeline, tmp_path: Path
) -> None:
    """Five images in batches of two, each with its own noise; in full precision too."""
    found = sampled(cli, shared_bundle, tmp_path, "--labels", 0, 1, 2, 3, 4)
    pairs = [pipeline.sample([i, i + 1][: 5 - i], first=i) for i in (0, 2, 4)]
    np.testing.assert_array_equal(found, np.concatenate(pairs))
    exact = sampled(cli, shared_bundle, tmp_path, "--labels", 0, "--target", "reference")
    wanted = Pipeline(shared_bundle, target="reference").sample([0])
    np.testing.assert_array_equal(exact, wanted)


def test_latents_are_written_as_they_are(cli: Cli, other_bundle: Bundle, tmp_path: Path) -> None:
    """Four channels, no decoder."""
    assert sampled(cli, other_bundle, tmp_path, "--labels", 0).shape == (1, 4, 8, 8)


def test_verify_and_inspect(cli: Cli, shared_bundle: Bundle, tmp_path: Path) -> None:
    """How many files; and everything that someone who was handed a bundle asks first."""
    done = cli("verify", shared_bundle.path)
    assert (done.code, done.out, done.err) == (0, f"{shared_bundle.path}: 12 files verified\n", "")
    done = cli("inspect", shared_bundle.path, "--json", tmp_path / "manifest.json")
    assert (done.code, done.err) == (0, "")
    for text in (
        "DiTTransformer2DModel",
        "3x16x16, 5 classes",
        "ddim, 6 steps, guidance 2.0",
        "w8a8 by absmax, 8 layers",
        "fora, interval 2, 4 slots",
        "onnxruntime/sampler",
        "4 class-4",
    ):
        assert text in " ".join(done.out.split())
    values = json.loads((tmp_path / "manifest.json").read_text())
    assert values == shared_bundle.manifest.model_dump(mode="json")


def test_inspect_prints_names_as_they_are(cli: Cli, tmp_path: Path) -> None:
    """Brackets are no markup, which could hide them, or be in error."""
    bundle = bundles.make(tmp_path / "b")
    info = bundle.manifest.model.model_copy(update={"classes": ("[/x]", "[red]dog")})
    bundle.commit({"model": info})
    done = cli("inspect", bundle.path)
    assert done.code == 0
    assert "0 [/x], 1 [red]dog" in done.out


def test_audit(cli: Cli, bundle: Bundle, tmp_path: Path) -> None:
    """Exit code 0 where every layer is in integers, 1 where one is not, with its name."""
    done = cli("audit", bundle.path, "--loop", "graph", "--json", tmp_path / "audit.json")
    assert done.code == 0
    assert done.err == "" or done.err.startswith("ditcast: warning: int8 may not pay on this CPU")
    first, second, third, *table = done.out.splitlines()
    assert first == "audit: 8 of 8 quantized layers of sampler.onnx run in integer kernels"
    assert second.startswith("audit: the golden step comes out at ")
    assert third.startswith("audit: a large MatMul runs at ")
    assert "precision" in table[1]
    (row,) = (line.split("│")[1:-1] for line in table if "blocks.1.mlp.fc2" in line)
    kernel, precision, _, share, *_ = (cell.strip() for cell in row[1:])
    assert (kernel, precision) == ("MatMulIntegerToFloat", "integer")
    assert share.endswith("%")
    assert "all kernels" in table[-2]
    values = json.loads((tmp_path / "audit.json").read_text())
    assert values["passed"] is True
    assert len(values["layers"]) == 8
    for name in ("full.onnx", "weights.data"):
        shutil.copy(
            bundle.file(f"graphs/reference/{name}"), bundle.staged(f"graphs/onnxruntime/{name}")
        )
    bundle.commit({})
    done = cli("audit", bundle.path, "--json", tmp_path / "audit.json")
    assert done.code == 1
    lost = [line for line in done.out.splitlines() if line.startswith("FLOAT")]
    assert [line.split(":")[0] for line in lost[:2]] == [
        "FLOAT blocks.0.attn.qkv",
        "FLOAT blocks.0.attn.proj",
    ]
    assert "audit: 0 of 8 quantized layers of full.onnx run in integer kernels\n" in done.out
    assert json.loads((tmp_path / "audit.json").read_text())["passed"] is False


def test_stages_one_by_one(cli: Cli, tiny_dir: Path, shared_bundle: Bundle, tmp_path: Path) -> None:
    """Recipe file and flags together give the very bundle that Python gives."""
    (tmp_path / "recipe.yaml").write_text(
        "steps: 6\ninterval: 4\nsamples: 4\ncache: fora\norder: 1\n"
    )
    path = tmp_path / "new.bundle"
    recipe = ("--recipe", tmp_path / "recipe.yaml", "--interval", 2, "--batch", 2)
    done = cli("calibrate", tiny_dir, "-o", path, *recipe)
    assert (done.code, done.out) == (0, f"{path}: calibrated; next: ditcast export {path}\n")
    assert Bundle.open(path).manifest.recipe == shared_bundle.manifest.recipe
    done = cli("export", path)
    assert (done.code, done.out) == (0, f"{path}: exported; next: ditcast bench {path}\n")
    assert Bundle.open(path).manifest.files == shared_bundle.manifest.files
    assert cli("calibrate", tiny_dir, "-o", path, *recipe).code == 0  # nothing left to do
    assert cli("export", path).err == ""
    assert Bundle.open(path).verify() == 12


def test_compile_goes_on_where_it_stopped(
    cli: Cli, tiny_dir: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a bundle that is exported it audits, measures, and puts the report into the bundle."""
    monkeypatch.setattr(bench, "_peak_memory_mib", lambda *arguments: 123.0)
    figures = tmp_path / "bench.json"
    done = cli(
        *("compile", tiny_dir, "-o", bundle.path, *FLAGS, "--images", 1, "--threads", 1),
        *("--json", figures),
    )
    assert done.code == 0
    assert "exporting" not in done.err
    assert "8 of 8 quantized layers" in done.out
    assert "w8a8 + cache" in done.out
    values = json.loads(figures.read_text())
    assert [row["peak_memory_mib"] for row in values["variants"]] == [123.0] * 5
    assert "shown" not in values
    assert values["cost"] == {}  # there was nothing left to calibrate and to export
    assert values["request"]["seed"] == 1  # not 0, on which the scales were found
    found = Bundle.open(bundle.path)
    assert found.manifest.graphs == bundle.manifest.graphs
    assert "reports/report.html" in found.manifest.reports
    found.verify()


def test_compile_fails_with_its_audit(
    cli: Cli, tiny_dir: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It measures all the same, and then exits with 1."""
    monkeypatch.setattr(bench, "_peak_memory_mib", lambda *arguments: 123.0)
    for name in ("full.onnx", "weights.data"):
        content = bundle.file(f"graphs/reference/{name}").read_bytes()
        bundle.staged(f"graphs/onnxruntime/{name}").write_bytes(content)
    bundle.commit({})
    done = cli("compile", tiny_dir, "-o", bundle.path, *FLAGS, "--images", 1)
    assert done.code == 1
    assert "0 of 8 quantized layers" in done.out
    assert "reports/bench.json" in Bundle.open(bundle.path).manifest.reports


def test_a_graph_that_differs_from_torch_is_a_failed_check(
    cli: Cli, tiny_dir: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, not 2: it is not the user's mistake."""

    def differ(*arguments: object) -> None:
        raise ParityError("export: full.onnx differs from torch")

    monkeypatch.setattr("ditcast.export.to_onnx", differ)
    done = cli("export", bundle.path)
    assert (done.code, done.err) == (1, "ditcast: error: export: full.onnx differs from torch\n")


def test_a_model_that_changed_is_not_exported(
    cli: Cli, tiny_dir: Path, bundle: Bundle, tmp_path: Path
) -> None:
    """Its scales are of other weights; and a model that is gone cannot be exported at all."""
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    config = model / "transformer" / "config.json"
    config.write_text(config.read_text() + " ")
    info = bundle.manifest.model.model_copy(update={"source": str(model)})
    bundle.commit({"model": info})
    done = cli("export", bundle.path)
    assert done.code == 2
    assert f"{model} has changed since {bundle.path} was calibrated; compile a new" in done.err
    shutil.rmtree(model)
    done = cli("export", bundle.path)
    assert done.code == 2
    assert f"model: '{model}' is neither 'emoji', " in done.err


def test_every_recipe_key_is_a_flag(cli: Cli) -> None:
    """With its default beside it; rules are too long for a flag."""
    done = cli("compile", "--help")
    text = " ".join(done.out.split())
    for name, field in Recipe.model_fields.items():
        assert (f"--{name.replace('_', '-')} " in text) == (name != "rules")
        if name != "rules":
            default = {(): "all", None: "none"}.get(field.default, field.default)
            assert f"[default: {default}]" in text


def test_help_and_version(cli: Cli) -> None:
    """Without arguments the commands are listed, not an error."""
    assert cli("--version").out == f"ditcast, version {__version__}\n"
    done = cli()
    assert (done.code, done.err) == (0, "")
    for command in (
        "compile",
        "calibrate",
        "export",
        "sample",
        "bench",
        "audit",
        "verify",
        "inspect",
        "report",
        "gate",
        "compare",
    ):
        assert f"\n  {command} " in done.out


def test_ctrl_c_is_no_traceback(
    cli: Cli, shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that the same command resumes."""

    def interrupt(self: Bundle) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bundle, "verify", interrupt)
    done = cli("verify", shared_bundle.path)
    assert done.code == 2
    assert done.err.strip() == "ditcast: error: interrupted; run the same command again to resume"


def test_a_file_system_error_names_the_file(
    cli: Cli, shared_bundle: Bundle, tmp_path: Path
) -> None:
    """Such as a folder in the place of the output."""
    (tmp_path / "out.npy").mkdir()
    done = cli("sample", shared_bundle.path, "-o", tmp_path / "out.npy", "--labels", 0)
    assert done.code == 2
    assert done.err == f"ditcast: error: {tmp_path / 'out.npy'}: Is a directory\n"


def test_a_class_name_may_hold_a_comma() -> None:
    """As the names of ImageNet do."""
    classes = ("tench, Tinca tinca", "goldfish")
    joined = join_labels(["--labels", "tench, Tinca tinca", "goldfish", "--seed", "1"])
    assert parse_labels(joined[1], classes) == [0, 1]
    assert parse_labels("1,0", classes) == [1, 0]
    assert joined[2:] == ["--seed", "1"]


def test_labels_to_be_stored_are_numbers_or_names(cli: Cli, tiny_dir: Path, tmp_path: Path) -> None:
    """Of the model that is compiled; they become part of the recipe, and null is stored too."""
    keys = [f"--{key}={value}" for key, value in (RECIPE | {"temporal": "cache"}).items()]
    done = cli("calibrate", tiny_dir, "-o", tmp_path / "b", *keys, "--labels", "class-3", "1")
    assert done.code == 0
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.recipe.labels == (3, 1)
    assert manifest.quantization is not None
    assert manifest.quantization.stored == (1, 3, 5)
    assert set(manifest.quantization.labels) <= {1, 3}  # of trajectories
    done = cli("calibrate", tiny_dir, "-o", tmp_path / "c", *keys, "--labels", "class-9")
    assert done.code == 2
    assert "labels: got 'class-9', expected class numbers or a name, such as class-0" in done.err
