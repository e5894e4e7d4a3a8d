"""The export stage: model and scales in, verified ONNX graphs of every target out."""

from __future__ import annotations

import shutil
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
from ditcast.cache import StepPlan, make_plan
from ditcast.calibrate.qparams import QParams, quantized
from ditcast.calibrate.qparams import load as load_qparams
from ditcast.calibrate.trajectory import sample
from ditcast.errors import BundleError
from ditcast.export import parity
from ditcast.export.loop import LoopSpec, sampler_graph
from ditcast.export.quantize import insert_qdq
from ditcast.export.store import WeightStore
from ditcast.export.trace import trace
from ditcast.manifest import Graph, hash_file
from ditcast.models import Adapter, LoadedModel
from ditcast.progress import say
from ditcast.sampling import coefficients, draw_noise, needs_noise
from ditcast.schedule import NoiseSchedule, from_config

TARGETS = ("reference", "onnxruntime")
STEP_GRAPHS = ("temporal", "full", "reuse")
SHORT, SHORT_STEPS = "short", 2  # a graph loop that is only there while parity is measured


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


def to_onnx(bundle: Bundle, model: LoadedModel) -> None:
    """Export all graphs of all targets and commit them; does nothing where they are up to date.

    Raises:
        BundleError: the bundle's recipe quantizes but it was not calibrated, or the disk is too
            small.
        ParityError: a graph does not compute what the model computes.
    """
    made_from = bundle.graphs_made_from()
    graphs = bundle.manifest.graphs
    if graphs and all(graph.made_from == made_from for graph in graphs):
        return
    bundle.clear()  # what an interrupted export staged takes up the disk that is checked here
    _check_disk(bundle, model)
    qparams = _qparams(bundle, model)
    schedule = from_config(bundle.manifest.schedule)
    probes = make_probes(model, schedule, bundle.manifest.recipe.seed)
    say("exporting: tracing the model")
    linears = model.adapter.linears()
    traced = {
        name: trace(
            probe.module,
            list(probe.feeds.values()),
            inputs=list(probe.feeds),
            outputs=probe.outputs,
            dynamic=probe.dynamic,
            layers=linears,
        )
        for name, probe in probes.items()
    }
    found: list[Graph] = []
    golden: dict[str, Any] = {f"input.{k}": v.numpy() for k, v in probes["full"].feeds.items()}
    for target in TARGETS:
        say(f"exporting: writing target {target} and comparing it with torch")
        scales = {} if target == "reference" else qparams
        folder = bundle.staged(f"graphs/{target}/sampler.onnx").parent
        _write_target(bundle, model, target, folder, traced=traced, qparams=scales)
        differences, outputs = _compare(bundle, model.adapter, folder, probes, scales)
        golden[f"output.{target}"] = outputs
        for name in (*STEP_GRAPHS, "sampler"):
            path = f"graphs/{target}/{name}.onnx"
            found.append(
                Graph(
                    target=target,
                    name=name,
                    path=path,
                    made_from=made_from,
                    parity=differences[name],
                )
            )
    tensors.save(golden, bundle.staged("golden/step.safetensors"))
    bundle.commit({"graphs": tuple(found), "golden": ("golden/step.safetensors",)}, "graphs/")


def make_probes(model: LoadedModel, schedule: NoiseSchedule, seed: int) -> dict[str, Probe]:
    """The step graphs with inputs of a real request: two images with guidance, mid-trajectory."""
    adapter = model.adapter
    labels = torch.tensor([0, adapter.num_classes - 1, adapter.num_classes])
    total = len(schedule.alphas_cumprod)
    timesteps = torch.tensor([float(total // 2), float(total // 4)])
    noise = [draw_noise(seed, i, adapter.sample_shape, 0)[0] for i in range(2)]
    sample = torch.from_numpy(np.stack(noise)).repeat(2, 1, 1, 1)
    with torch.no_grad():
        features = adapter.temporal(timesteps, labels)[0][torch.tensor([0, 1, 2, 2])]
        caches = adapter.denoiser(sample, features)[1:]
    names = [f"cache.{slot}" for slot in adapter.slots]
    rows, step = Dim("N"), {"sample": sample, "features": features}
    weights = {"weights": torch.ones(1, len(names))}
    return {
        "temporal": Probe(
            adapter.temporal,
            {"timesteps": timesteps, "class_labels": labels},
            ["features"],
            [{0: Dim("T")}, {0: Dim("U")}],
        ),
        "full": Probe(adapter.denoiser, step, ["output", *names], [{0: rows}, {0: rows}]),
        "reuse": Probe(
            adapter.reuse(1),
            step | weights | dict(zip(names, caches, strict=True)),
            ["output"],
            [{0: rows}, {0: rows}, {}, {0: rows}],
        ),
    }


def _write_target(
    bundle: Bundle,
    model: LoadedModel,
    target: str,
    folder: Path,
    *,
    traced: dict[str, gs.Graph],
    qparams: QParams,
) -> None:
    """All graphs of one target over one weights file, and a short graph loop for parity."""
    weights = {name: linear.weight.data for name, linear in model.adapter.linears().items()}
    with WeightStore(folder) as store:
        for name in STEP_GRAPHS:
            graph = traced[name].copy()
            if name == "full" and qparams:
                insert_qdq(graph, qparams, target, weights)
            store.save(graph, folder / f"{name}.onnx")
        parts = {
            name: onnx.load(folder / f"{name}.onnx", load_external_data=False)
            for name in STEP_GRAPHS
        }
        for name, steps in (("sampler", bundle.manifest.recipe.steps), (SHORT, SHORT_STEPS)):
            spec = _loop_spec(bundle, model.adapter, parts, steps)
            store.save_proto(sampler_graph(spec), folder / f"{name}.onnx")


def _loop_spec(
    bundle: Bundle, adapter: Adapter, parts: dict[str, onnx.ModelProto], steps: int
) -> LoopSpec:
    """The first `steps` steps of the bundle's schedule and plan."""
    recipe, plan = bundle.manifest.recipe, _plan(bundle)
    schedule = from_config(bundle.manifest.schedule)
    return LoopSpec(
        temporal=parts["temporal"],
        full=parts["full"],
        reuse=parts["reuse"],
        plan=StepPlan(full=plan.full[:steps], weights=plan.weights[:steps]),
        timesteps=schedule.timesteps(recipe.steps)[:steps],
        table=coefficients(schedule, recipe.sampler, recipe.steps)[:steps],
        clip=schedule.clip,
        null_label=adapter.num_classes,
        sample_shape=adapter.sample_shape,
        step_noise=needs_noise(recipe.sampler),
    )


def _plan(bundle: Bundle) -> StepPlan:
    recipe, slots = bundle.manifest.recipe, len(bundle.manifest.model.slots)
    return make_plan(recipe.cache, steps=recipe.steps, interval=recipe.interval, slots=slots)


def _compare(
    bundle: Bundle,
    adapter: Adapter,
    folder: Path,
    probes: dict[str, Probe],
    qparams: QParams,
) -> tuple[dict[str, dict[str, float]], Any]:
    """Parity of every graph, and the full step's output for the golden file.

    The graph loop is compared over its first steps, a full one and one that follows: the whole
    trajectory of a large model would take many minutes.
    """
    found: dict[str, dict[str, float]] = {}
    output: Any = None
    probes = probes | {"sampler": _loop_probe(bundle, adapter)}
    for name, probe in probes.items():
        expected, unquantized = probe.run(), None
        if qparams and name in ("full", "sampler"):
            names = probe.outputs[:2]  # the output and, of the full step, the first slot
            unquantized = {slot: expected[slot] for slot in names[1:]}
            with quantized(adapter.linears(), qparams):
                simulated = probe.run()
            expected = {output: simulated[output] for output in names}
        path = folder / f"{SHORT if name == 'sampler' else name}.onnx"
        found[name], outputs = parity.measure(path, probe.feeds, expected, unquantized)
        if name == "full":
            output = outputs["output"]
    (folder / f"{SHORT}.onnx").unlink()
    return found, output


def _loop_probe(bundle: Bundle, adapter: Adapter) -> Probe:
    """The first steps of one image with guidance, as torch samples them."""
    recipe, schedule = bundle.manifest.recipe, from_config(bundle.manifest.schedule)
    label, steps = adapter.num_classes - 1, min(SHORT_STEPS, recipe.steps)

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
            plan=_plan(bundle),
            stop_after=steps,
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
        path = bundle.file(quantization.file)
        if hash_file(path) != bundle.manifest.files[quantization.file]:
            raise BundleError(
                f"export: {path} is damaged (its SHA-256 differs); compile the bundle again"
            )
        return load_qparams(path)
    if any(rule.precision != "float" for rule in bundle.manifest.recipe.layer_rules()):
        raise BundleError(
            f"export: {bundle.path} is not calibrated; "
            f"run: ditcast calibrate {model.source} -o {bundle.path}"
        )
    return {}


def _check_disk(bundle: Bundle, model: LoadedModel) -> None:
    """Both targets need at most the parameters in float twice."""
    needed = 2 * 4 * bundle.manifest.model.parameters
    free = shutil.disk_usage(bundle.path).free
    if free < needed:
        raise BundleError(
            f"export: the disk of {bundle.path} has {free / 2**20:.0f} MiB free, expected at "
            f"least {needed / 2**20:.0f} MiB for {model.source}; free some space and run again"
        )
