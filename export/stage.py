"""The export stage: model and scales in, verified ONNX graphs of every target out."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from torch import Tensor
from torch.export import Dim

from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.cache import StepPlan
from ditcast.cache.fitted import Fitted, missing, of_target, recipe_plan
from ditcast.calibrate.qparams import QParams, of_bundle
from ditcast.calibrate.simulate import Simulation, quantized
from ditcast.calibrate.trajectory import sample
from ditcast.errors import BundleError, ConfigError
from ditcast.export import parity
from ditcast.export.loop import LoopSpec, sampler_graph
from ditcast.export.quantize import insert_qdq
from ditcast.export.store import WeightStore, check_disk
from ditcast.export.targets import TARGETS, encodings
from ditcast.export.tensorrt import KEPT, lower
from ditcast.export.trace import trace
from ditcast.manifest import REFERENCE, WEIGHTS, Graph
from ditcast.models import Adapter, LoadedModel
from ditcast.models.base import Layer, is_near
from ditcast.progress import say
from ditcast.recipe import FLOAT, TEMPORAL
from ditcast.sampling import coefficients, correct, draw_noise, needs_noise, with_null
from ditcast.schedule import from_config

DEFAULT_TARGETS = ("onnxruntime",)
GOLDEN = "golden/step.safetensors"
STEP_GRAPHS = ("temporal", "full", "reuse")
SHORT = "short"  # a graph loop that is only there while parity is measured


class Probe(NamedTuple):
    """One graph in torch with real inputs: what is traced and what parity is measured on."""

    module: Any  # a torch module, or for the graph loop a function
    feeds: dict[str, Tensor]
    outputs: list[str]
    dynamic: list[dict[int, Any]]

    @torch.no_grad()
    def run(self) -> dict[str, Tensor]:
        """The outputs by name."""
        found = self.module(*self.feeds.values())
        return dict(zip(self.outputs, found if isinstance(found, tuple) else (found,), strict=True))

    def first_slot(self) -> Probe:
        """The full step with a forecast of the first slot only."""
        cut = {name: self.feeds[name][:1] for name in ("ahead", "weights")}
        return self._replace(feeds=self.feeds | cut)


def to_onnx(bundle: Bundle, model: LoadedModel, targets: Sequence[str] = DEFAULT_TARGETS) -> None:
    """Export the graphs of `targets` and of full precision; only what is missing or stale.

    Raises:
        ConfigError: no such target.
        BundleError: the bundle's recipe quantizes but it was not calibrated, or the disk is too
            small.
        ParityError: a graph does not compute what the model computes.
    """
    due, held = _due(bundle, targets)
    if not due:
        return
    bundle.clear()  # what an interrupted export staged takes up the disk that is checked here
    check_disk(bundle, model, len(due))
    qparams = _qparams(bundle, model)
    if missing(bundle.manifest):
        raise BundleError(
            f"export: {bundle.path} is not calibrated for its cache; "
            f"run: ditcast calibrate {model.source} -o {bundle.path}"
        )
    found = [graph for graph in bundle.manifest.graphs if graph.target in held]
    golden: dict[str, Any] = {}
    if held:
        golden, _ = tensors.load(bundle.file(GOLDEN))
    for targets, scales in encodings(model.adapter, due, qparams):
        found += _export(bundle, model, targets, scales, golden)
    tensors.save(golden, bundle.staged(GOLDEN))
    replaces = "" if held else "graphs/"
    bundle.commit({"graphs": tuple(found), "golden": (GOLDEN,)}, replaces)


def _due(bundle: Bundle, targets: Sequence[str]) -> tuple[list[str], set[str]]:
    """The targets to export, and those that the bundle holds and keeps."""
    for target in targets:
        if target not in TARGETS:
            raise ConfigError(f"target: unknown {target!r}; expected one of {', '.join(TARGETS)}")
    graphs, made_from = bundle.manifest.graphs, bundle.graphs_made_from()
    held = {graph.target for graph in graphs}
    wanted = held | {REFERENCE, *targets}
    if any(graph.made_from != made_from for graph in graphs):
        held = set()
    return [target for target in TARGETS if target in wanted - held], held


def _export(
    bundle: Bundle,
    model: LoadedModel,
    targets: Sequence[str],
    qparams: QParams,
    golden: dict[str, Any],
) -> list[Graph]:
    """Stage the graphs of targets that encode the same numbers; adds their golden steps."""
    found, adapter = [], model.adapter
    with quantized(adapter, qparams) as simulation:
        probes = make_probes(bundle, adapter)
        say("exporting: tracing the model")
        with simulation.exact():
            traced = {
                name: trace(
                    probe.module,
                    list(probe.feeds.values()),
                    inputs=list(probe.feeds),
                    outputs=probe.outputs,
                    dynamic=probe.dynamic,
                    layers=simulation.originals,
                )
                for name, probe in probes.items()
            }
        for target in targets:
            say(f"exporting: writing target {target} and comparing it with torch")
            folder = bundle.staged(f"graphs/{target}/{WEIGHTS}").parent
            fitted = of_target(bundle, target)
            _write_target(
                bundle,
                adapter,
                target,
                folder,
                traced=traced,
                qparams=qparams,
                originals=simulation.originals,
                fitted=fitted,
            )
            measured = probes
            if TARGETS[target].loop:
                measured = probes | {"sampler": _loop_probe(bundle, adapter, fitted)}
            half = TARGETS[target].typed
            parities, output = _compare(adapter, folder, measured, simulation, half)
            feeds = probes["full"].feeds
            golden |= {f"{target}.input.{k}": feed.numpy() for k, feed in feeds.items()}
            golden[f"{target}.output"] = output
            found += [
                Graph(
                    target=target,
                    name=name,
                    path=f"graphs/{target}/{name}.onnx",
                    made_from=bundle.graphs_made_from(),
                    parity=parity,
                )
                for name, parity in parities.items()
            ]
    return found


def make_probes(bundle: Bundle, adapter: Adapter) -> dict[str, Probe]:
    """The step graphs with inputs of a real request: two images, mid-trajectory.

    With guidance, where the model has a null label.
    """
    recipe, null = bundle.manifest.recipe, adapter.null_label
    labels = torch.tensor(with_null(_two_labels(bundle), null))
    known = from_config(bundle.manifest.schedule).timesteps(recipe.steps)
    half = len(known) // 2
    timesteps = torch.tensor([float(known[half]), float(known[(half + len(known)) // 2])])
    noise = [draw_noise(recipe.seed, i, adapter.sample_shape, 0)[0] for i in range(2)]
    sample = torch.from_numpy(np.stack(noise)).repeat(2, 1, 1, 1)
    with torch.no_grad():
        features = adapter.temporal(timesteps, labels)[
            :, torch.tensor([0, 1, 0, 1] if null is None else [0, 1, 2, 2])
        ]
        ahead = features[1:].repeat(2, 1, 1)
        # The first row has the first slot alone: what lies behind the first layers only.
        weights = torch.ones(2, len(adapter.slots))
        weights[0, 1:] = 0
        forecast = adapter.denoiser(sample, features[0], ahead, weights)[1][1]
    rows, step = Dim("N"), {"sample": sample, "features": features[0]}
    later = {"ahead": ahead, "weights": weights}
    steps = Dim("R")
    return {
        "temporal": Probe(
            adapter.temporal,
            {"timesteps": timesteps, "class_labels": labels},
            ["features"],
            [{0: Dim("T")}, {0: Dim("U")}],
        ),
        "full": Probe(
            adapter.denoiser,
            step | later,
            ["output", "forecast"],
            [{0: rows}, {0: rows}, {0: steps, 1: rows}, {0: steps}],
        ),
        "reuse": Probe(
            adapter.reuse,
            step | {"forecast": forecast},
            ["output"],
            [{0: rows}, {0: rows}, {0: rows}],
        ),
    }


def _two_labels(bundle: Bundle) -> tuple[int, int]:
    """The first and the last label whose features the bundle can give."""
    labels = bundle.manifest.stored_labels() or range(bundle.manifest.model.num_classes)
    return labels[0], labels[-1]


def _write_target(
    bundle: Bundle,
    adapter: Adapter,
    target: str,
    folder: Path,
    *,
    traced: dict[str, gs.Graph],
    qparams: QParams,
    originals: dict[str, Layer],
    fitted: Fitted,
) -> None:
    """All graphs of one target over one weights file, and a short graph loop for parity."""
    group = bundle.manifest.recipe.group
    with WeightStore(folder) as store:
        for name in STEP_GRAPHS:
            graph = traced[name].copy()
            held = _layers_in(adapter, name, qparams.layers)
            layers = {layer: qparams.layers[layer] for layer in held}
            if layers:
                insert_qdq(graph, layers, TARGETS[target], originals, group)
            if TARGETS[target].typed:
                lower(graph, name)
            store.save(graph, folder / f"{name}.onnx")
        parts = {
            name: onnx.load(folder / f"{name}.onnx", load_external_data=False)
            for name in STEP_GRAPHS
        }
        loops = (("sampler", bundle.manifest.recipe.steps), (SHORT, _short_steps(bundle)))
        for name, steps in loops if TARGETS[target].loop else ():
            spec = _loop_spec(bundle, adapter, parts, fitted, steps)
            spec = replace(spec, fixed_rows=TARGETS[target].typed)
            store.save_proto(sampler_graph(spec), folder / f"{name}.onnx")


def _layers_in(adapter: Adapter, graph: str, layers: Iterable[str]) -> list[str]:
    """Those of the layers that a graph holds."""
    shallow = tuple(f"{name}." for name in adapter.shallow)
    starts = {"temporal": (TEMPORAL,), "reuse": shallow}
    if graph in starts:
        return [name for name in layers if name.startswith(starts[graph])]
    return [name for name in layers if graph == "sampler" or not name.startswith(TEMPORAL)]


def _loop_spec(
    bundle: Bundle,
    adapter: Adapter,
    parts: dict[str, onnx.ModelProto],
    fitted: Fitted,
    steps: int,
) -> LoopSpec:
    """The first `steps` steps of the bundle's schedule and plan."""
    recipe, plan = bundle.manifest.recipe, fitted.plan(bundle.manifest)
    schedule = from_config(bundle.manifest.schedule)
    return LoopSpec(
        temporal=parts["temporal"],
        full=parts["full"],
        reuse=parts["reuse"],
        plan=StepPlan(full=plan.full[:steps], weights=plan.weights[:steps]),
        timesteps=schedule.timesteps(recipe.steps)[:steps],
        table=coefficients(schedule, recipe.sampler, recipe.steps)[:steps],
        clip=schedule.clip,
        null_label=adapter.null_label,
        sample_shape=adapter.sample_shape,
        slot_shape=adapter.slot_shape,
        step_noise=needs_noise(recipe.sampler),
        gain=None if fitted.gain is None else fitted.gain[:steps],
        offset=None if fitted.offset is None else fitted.offset[:steps],
    )


def _short_steps(bundle: Bundle) -> int:
    """Up to the first reuse step, if there is one; at least two, where there are as many."""
    plan = recipe_plan(bundle.manifest)
    first = 1 if plan.full.all() else int(np.argmin(plan.full))
    return min(max(first, 1) + 1, len(plan.full))


def _compare(
    adapter: Adapter, folder: Path, probes: dict[str, Probe], simulation: Simulation, half: bool
) -> tuple[dict[str, dict[str, float]], Any]:
    """Parity of every graph, and the full step's output for the golden file.

    The graph loop is compared over its first steps, a full one and one that follows: the whole
    trajectory of a large model would take many minutes.
    """
    found: dict[str, dict[str, float]] = {}
    golden: Any = None
    short = folder / f"{SHORT}.onnx"
    rounding = [name for name, layer in simulation.layers.items() if layer.scale is not None]
    for name, probe in probes.items():
        unquantized, whole = None, None
        if _layers_in(adapter, name, rounding):
            unquantized = {}
            # Behind more than the first layers, only closeness of the whole can be asked.
            if is_near(adapter, name):
                probe = probe.first_slot() if name == "full" else probe
                output = probe.outputs[-1]
                unquantized = {output: _exactly(probe, simulation)[output]}
            elif name == "sampler":  # of step graphs that have been compared by themselves
                whole = functools.partial(_exactly, probe, simulation)
        path = short if name == "sampler" else folder / f"{name}.onnx"
        found[name], outputs = parity.measure(
            path, probe.feeds, probe.run(), unquantized, whole, half=half and name != KEPT
        )
        if name == "full":
            golden = outputs["output"]
    short.unlink(missing_ok=True)
    return found, golden


def _exactly(probe: Probe, simulation: Simulation) -> dict[str, Tensor]:
    with simulation.exact():
        return probe.run()


def _loop_probe(bundle: Bundle, adapter: Adapter, fitted: Fitted) -> Probe:
    """The first steps of one image with guidance, as torch samples them."""
    recipe, schedule = bundle.manifest.recipe, from_config(bundle.manifest.schedule)
    label, steps = _two_labels(bundle)[1], _short_steps(bundle)

    def corrected(step: int, x: Tensor) -> Tensor:
        assert fitted.gain is not None
        assert fitted.offset is not None
        found: Tensor = correct(
            x, torch.from_numpy(fitted.gain[step]), torch.from_numpy(fitted.offset[step])
        )
        return found

    def first_steps(*feeds: Tensor) -> Tensor:
        del feeds  # the same noise, drawn again
        return sample(
            adapter,
            schedule,
            sampler=recipe.sampler,
            steps=recipe.steps,
            guidance=recipe.guidance,
            seed=recipe.seed,
            indices=[0],
            labels=[label],
            plan=fitted.plan(bundle.manifest),
            stop_after=steps,
            correct=corrected if fitted.gain is not None else None,
        )

    noises = recipe.steps if needs_noise(recipe.sampler) else 0
    noise = torch.from_numpy(draw_noise(recipe.seed, 0, adapter.sample_shape, noises))
    feeds = {
        "noise": noise[:1],
        "class_labels": torch.tensor([label]),
        "guidance_scale": torch.tensor(recipe.guidance),
    }
    if noises:
        feeds["step_noise"] = noise[1 : steps + 1, None]
    return Probe(first_steps, feeds, ["latents"], [])


def _qparams(bundle: Bundle, model: LoadedModel) -> QParams:
    """The bundle's scales; empty where its recipe quantizes nothing."""
    quantization = bundle.manifest.quantization
    if quantization is not None:
        if quantization.made_from != bundle.manifest.fingerprint():
            raise BundleError(
                f"export: the scales in {bundle.path} are of another recipe; "
                f"compile the bundle again"
            )
    elif any(rule.precision != FLOAT for rule in bundle.manifest.recipe.layer_rules()):
        raise BundleError(
            f"export: {bundle.path} is not calibrated; "
            f"run: ditcast calibrate {model.source} -o {bundle.path}"
        )
    return of_bundle(bundle)
