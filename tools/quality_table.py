"""Measure what quantization methods do to a model's images: every method, scheme and seed.

A run calibrates, samples in the torch simulation, and compares with the full-precision images of
the same noise and labels, which no calibration has seen. Bundles and figures are kept under
`--output`, so that an interrupted table goes on where it stopped, and a longer one takes up a
shorter. After a change of the calibration code, give another `--output`.

    pip install 'ditcast[compile,distances]'
    python tools/emoji_dataset.py -o build/emoji.npz
    python tools/quality_table.py emoji --data build/emoji.npz --steps 20 50 --page quality.html

Without `--data` there are no distances between sets, and nothing has to be installed for them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import quality_report
import torch
from bench_cpu import paired
from command import Parser, tool
from cpu_report import spread
from quality_run import (
    DAMAGES,
    SEED,
    Samples,
    calibrated,
    compare_features,
    image_labels,
    sampled,
    storable_labels,
)

from ditcast.calibrate.simulate import quantized
from ditcast.calibrate.stage import check as check_recipe
from ditcast.errors import ConfigError, DitcastError, optional
from ditcast.held_out import open_distances
from ditcast.models import LoadedModel, load
from ditcast.progress import say
from ditcast.recipe import Recipe, Scheme, make
from ditcast.runtime import machine
from ditcast.runtime.images import to_unit

METHODS: dict[str, dict[str, Any]] = {
    "absmax": {"method": "absmax", "temporal": "fp"},
    "absmax-tib": {"method": "absmax", "temporal": "tib", "fsc": "none"},
    "mse": {"method": "mse", "temporal": "fp"},
    "smooth": {"method": "absmax", "temporal": "fp", "balance": "smooth"},
    "naive": {"method": "tfmq", "temporal": "naive", "fsc": "none"},
    "naive-nearest": {"method": "tfmq", "temporal": "naive", "fsc": "none", "init": "nearest"},
    "tiar": {"method": "tfmq", "temporal": "tib", "fsc": "none"},
    "fsc": {"method": "tfmq", "temporal": "naive", "fsc": "tib"},
    "tfmq": {"method": "tfmq", "temporal": "tib", "fsc": "tib"},
    "tfmq-all": {"method": "tfmq", "temporal": "tib", "fsc": "all"},
    "tfmq-nearest": {"method": "tfmq", "temporal": "tib", "init": "nearest"},
    "gptq": {"method": "tfmq", "temporal": "tib", "iterations": 0},
    "tfmq-fp": {"method": "tfmq", "temporal": "fp"},
    "tfmq-all-fp": {"method": "tfmq", "temporal": "fp", "fsc": "all"},
    "cache": {"method": "tfmq", "temporal": "cache"},
    "select": {"method": "tfmq", "temporal": "select"},
    "brecq": {"method": "brecq", "temporal": "fp"},
    "brecq-tib": {"method": "brecq", "temporal": "tib"},
    "ptq4dit": {"method": "brecq", "temporal": "tib", "balance": "ptq4dit"},
    "ptq4dit-all": {"method": "brecq", "temporal": "tib", "balance": "ptq4dit", "fsc": "all"},
    "ptq4dit-all-fp": {"method": "brecq", "temporal": "fp", "balance": "ptq4dit", "fsc": "all"},
}
SCHEMES = ("w8a8", "w4a8", "w4a16", "w6a6")
STORING = ("cache", "select")  # temporal features of some labels only, where not all fit
SHARED = ("iterations", "samples", "rows")  # recipe keys that are the same in all runs


class Reference(NamedTuple):
    """Images of full precision, and their features if distances are measured."""

    key: str
    samples: Samples
    features: torch.Tensor | None


class Judge:
    """Compares the images of quantized models with those of full precision."""

    def __init__(self, model: LoadedModel, args: argparse.Namespace) -> None:
        """Nothing is sampled yet."""
        self.model, self.output, self.count = model, args.output, args.images
        self.on_stored = args.stored_labels
        shape, classes = model.adapter.sample_shape, model.adapter.num_classes
        self.unit = shape[0] == 3  # pixels; latents are no pictures
        self.distances = (
            open_distances(args.data, args.images, shape, classes) if args.data else None
        )
        self.references: dict[str, Reference] = {}

    def run(self, name: str, recipe: Recipe, report: dict[str, Any]) -> dict[str, Any]:
        """All figures of one run."""
        found, cost = calibrated(self.model, recipe, self.output / name)
        labels = image_labels(self._classes(recipe), self.count)
        reference = self.reference(recipe, labels, report)
        say(f"{name}: sampling")
        with quantized(self.model.adapter, found):
            made = sampled(self.model, recipe, labels)
        quantizes_tib = recipe.temporal != "fp"
        return {
            "reference": reference.key,
            "labels": len(set(labels)),
            "calibration": cost,
            "features": compare_features(self.model, recipe, found, labels)
            if quantizes_tib
            else None,
        } | self.compare(made, reference, labels)

    def _classes(self, recipe: Recipe) -> list[int]:
        """The labels that a run is judged on: for stored features, those."""
        if recipe.temporal in STORING:
            return list(recipe.labels)
        if self.on_stored:
            return storable_labels(self.model, recipe)
        return list(range(self.model.adapter.num_classes))

    def compare(self, made: Samples, reference: Reference, labels: list[int]) -> dict[str, Any]:
        """Fidelity to a reference, and distances."""
        psnr = paired(made, reference.samples, unit=self.unit)
        found: dict[str, Any] = {"psnr_db": spread(psnr), "samples": len(psnr)}
        if self.distances is None or reference.features is None:
            return found
        features = self.distances.features(to_unit(made))
        return found | self.distances.judge(features, reference.features, labels)

    def reference(self, recipe: Recipe, labels: list[int], report: dict[str, Any]) -> Reference:
        """Full precision for these steps and labels; it and its sanity check enter the report."""
        parts = (self.model.fingerprint, recipe.sampler, recipe.steps, recipe.guidance, labels)
        digest = hashlib.sha256(json.dumps([*parts, SEED]).encode()).hexdigest()[:8]
        key = f"reference-{recipe.steps}-{digest}"
        if key not in self.references:
            self.references[key] = self._make_reference(key, recipe, labels)
        reference = self.references[key]
        if key not in report["references"]:
            found: dict[str, Any] = {"steps": recipe.steps, "labels": len(set(labels))}
            if self.distances is not None and reference.features is not None:
                found |= self.distances.to_real(reference.features, labels)
            report["references"][key] = found | {"sanity": self._sanity(reference, labels)}
        return reference

    def _make_reference(self, key: str, recipe: Recipe, labels: list[int]) -> Reference:
        path = self.output / f"{key}.npy"
        if not path.is_file():
            say(f"{key}: sampling full precision")
            partial = path.with_suffix(".tmp.npy")
            np.save(partial, sampled(self.model, recipe, labels))
            partial.replace(path)
        samples = np.load(path)
        features = self.distances.features(to_unit(samples)) if self.distances else None
        return Reference(key, samples, features)

    def _sanity(self, reference: Reference, labels: list[int]) -> dict[str, Any]:
        """The figures of images that are known to be bad; there are none of latents."""
        if not self.unit:
            return {}
        good = torch.from_numpy(to_unit(reference.samples))
        damaged = {name: damage(good).numpy() * 2 - 1 for name, damage in DAMAGES.items()}
        return {name: self.compare(bad, reference, labels) for name, bad in damaged.items()}


def plan(
    model: LoadedModel, args: argparse.Namespace, missing: dict[str, str]
) -> dict[str, tuple[dict[str, Any], Recipe]]:
    """What each run is and its recipe, by name; `missing` gets those that the model refuses."""
    found = {}
    shared = {key: getattr(args, key) for key in SHARED if getattr(args, key) is not None}
    for steps in args.steps:
        for scheme in args.schemes:
            for method in args.methods:
                for seed in args.seeds:
                    what = {"steps": steps, "scheme": scheme, "method": method, "seed": seed}
                    name = "-".join(map(str, what.values()))
                    values = what | shared | {"cache": "none"} | METHODS[method]
                    try:
                        found[name] = what, _fitting(model, make(values))
                    except DitcastError as err:
                        missing[name] = str(err)
    return found


def _fitting(model: LoadedModel, recipe: Recipe) -> Recipe:
    """The recipe, checked, with the labels that it can store."""
    if recipe.temporal in STORING:
        labels = tuple(storable_labels(model, recipe))
        recipe = recipe.model_copy(update={"labels": labels})
    check_recipe(model, recipe)
    return recipe


def start(model: LoadedModel, args: argparse.Namespace, judge: Judge) -> dict[str, Any]:
    """The report so far, with what is asked for now.

    Raises:
        ConfigError: the file holds figures that were measured otherwise.
    """
    data = hashlib.sha256(args.data.read_bytes()).hexdigest() if args.data else None
    defaults = {key: Recipe.model_fields[key].default for key in SHARED}
    request = {
        "model": model.source,
        "fingerprint": model.fingerprint,
        "images": args.images,
        "image_seed": SEED,
        "stored_labels_only": args.stored_labels,
        "data_sha256": data,
    } | {key: getattr(args, key) or value for key, value in defaults.items()}
    report: dict[str, Any] = {"request": request, "runs": {}, "references": {}}
    if args.json.is_file():
        report = json.loads(args.json.read_text())
        held = report["request"]
        differing = [key for key in request if held.get(key) != request[key]]
        if differing:
            raise ConfigError(
                f"json: {args.json} was measured with another "
                + ", ".join(f"{key} ({held.get(key)}, now {request[key]})" for key in differing)
                + "; give another --json"
            )
    facts = machine.describe()
    report["machine"] = facts | {"versions": facts["versions"] | machine.versions(["torch"])}
    report["distances"] = judge.distances.describe() if judge.distances else None
    report["missing"] = {}
    return report


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Do what is left to do, writing the report after each run."""
    model = load(args.model)
    judge = Judge(model, args)
    report = start(model, args, judge)
    wanted = plan(model, args, report["missing"])
    for i, (name, (what, recipe)) in enumerate(wanted.items(), start=1):
        values = recipe.model_dump(mode="json")
        if name in report["runs"]:
            if report["runs"][name]["recipe"] != values:
                raise ConfigError(f"json: {name} is of another recipe; give another --output")
            continue
        say(f"run {i} of {len(wanted)}: {name}")
        cpu, date = report["machine"]["cpu"], report["machine"]["date"]
        try:
            found = judge.run(name, recipe, report)
        except DitcastError as err:  # the others may still succeed
            report["missing"][name] = str(err)
        else:
            report["runs"][name] = what | found | {"recipe": values, "cpu": cpu, "date": date}
        write(report, args.json)
    write(report, args.json)
    return report


def write(report: dict[str, Any], path: Path) -> None:
    """Write the report with its summary, by temporary file and rename."""
    report["summary"] = quality_report.summarise(report["runs"].values(), list(METHODS))
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


def parse() -> argparse.Namespace:
    """The arguments; what is wrong with them is a `ConfigError`."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", nargs="?", default="emoji", metavar="MODEL", help="as for ditcast compile")
    add("--steps", type=int, nargs="+", default=[20])
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    add("--schemes", nargs="+", choices=get_args(Scheme)[:-1], default=list(SCHEMES))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibrations")
    add("--images", type=int, default=128, help="per run")
    for key in SHARED:
        add(f"--{key}", type=int, help=Recipe.model_fields[key].description)
    add("--stored-labels", action="store_true", help="judge all on labels that cache can store")
    add("--data", type=Path, help="what tools/emoji_dataset.py wrote: adds distances")
    add("-o", "--output", type=Path, default=Path("build/quality"), help="folder of what is kept")
    add("--json", type=Path, help="the figures  [default: quality.json in --output]")
    add("--page", type=Path, help="write a page, .html")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be, before the long work.

    Raises:
        ConfigError: too few images, a seed that images are judged on, or a file that is not there
            or cannot be written.
        MissingDependencyError: a page, but no plotly.
    """
    if args.images < 4:
        raise ConfigError(f"images: got {args.images}, expected at least 4")
    if SEED in args.seeds:
        raise ConfigError(f"seeds: {SEED} is that of the images; expected any other")
    args.output.mkdir(parents=True, exist_ok=True)
    args.json = args.json or args.output / "quality.json"
    for path in filter(None, (args.json, args.page)):
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: no folder {path.parent}; create it first")
    if args.page is not None:
        optional("plotly.graph_objects", "report")


@tool("quality_table")
def main() -> None:
    """Measure and report: exit 2 for wrong usage or input, in one line."""
    args = parse()
    check(args)
    report = measure(args)
    quality_report.show(report)
    if args.page is not None:
        quality_report.plot(report, args.page)


if __name__ == "__main__":
    main()
