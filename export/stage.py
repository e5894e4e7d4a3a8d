"""The export stage: model and scales in, verified ONNX graphs of every target out."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from safetensors.numpy import save_file
from torch import Tensor
from torch.export import Dim

from ditcast.bundle import Bundle, Graph
from ditcast.cache import make_plan
from ditcast.calibrate.qparams import QParams, quantized
from ditcast.calibrate.qparams import load as load_qparams
from ditcast.errors import BundleError
from ditcast.export import parity
from ditcast.export.loop import LoopSpec, sampler_graph
from ditcast.export.quantize import insert_qdq
from ditcast.export.store import WeightStore
from ditcast.export.trace import trace
from ditcast.models import LoadedModel
from ditcast.progress import say
from ditcast.sampling import coefficients, draw_noise, needs_noise
from ditcast.schedule import from_config

TARGETS = ("reference", "onnxruntime")
STEP_GRAPHS = ("temporal", "full", "reuse")


class Probe(NamedTuple):
    """One step graph in torch with real inputs: what is traced and what parity is measured on."""

    module: torch.nn.Module
    feeds: dict[str, Tensor]
    outputs: list[str]
    dynamic: list[dict[int, Any]]


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
    _check_disk(bundle, model)
    qparams = _qparams(bundle, model)
    probes = make_probes(model, bundle.manifest.recipe.seed)
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
        differences, outputs = _compare(folder, probes, linears, scales)
        golden[f"output.{target}"] = outputs
        for name in (*STEP_GRAPHS, "sampler"):
            path = f"graphs/{target}/{name}.onnx"
            found.append(
                Graph(
                    target=target,
                    name=name,
                    path=path,
                    made_from=made_from,
                    parity=differences.get(name, {}),
                )
            )
    save_file(golden, bundle.staged("golden/step.safetensors"))
    bundle.commit({"graphs": tuple(found), "golden": ("golden/step.safetensors",)}, "graphs/")


def make_probes(model: LoadedModel, seed: int) -> dict[str, Probe]:
    """The step graphs with inputs of a real request: two images with guidance, mid-trajectory."""
    adapter = model.adapter
    labels = torch.tensor([0, adapter.num_classes - 1, adapter.num_classes])
    total = len(from_config(model.scheduler).alphas_cumprod)
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
    """All graphs of one target over one weights file."""
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
        store.save_proto(sampler_graph(_loop_spec(bundle, model, parts)), folder / "sampler.onnx")


def _loop_spec(bundle: Bundle, model: LoadedModel, parts: dict[str, onnx.ModelProto]) -> LoopSpec:
    recipe, adapter = bundle.manifest.recipe, model.adapter
    schedule = from_config(model.scheduler)
    return LoopSpec(
        temporal=parts["temporal"],
        full=parts["full"],
        reuse=parts["reuse"],
        plan=make_plan(
            recipe.cache, steps=recipe.steps, interval=recipe.interval, slots=len(adapter.slots)
        ),
        timesteps=schedule.timesteps(recipe.steps),
        table=coefficients(schedule, recipe.sampler, recipe.steps),
        clip=schedule.clip,
        null_label=adapter.num_classes,
        sample_shape=adapter.sample_shape,
        step_noise=needs_noise(recipe.sampler),
    )


def _compare(
    folder: Path,
    probes: dict[str, Probe],
    linears: dict[str, torch.nn.Linear],
    qparams: QParams,
) -> tuple[dict[str, dict[str, float]], Any]:
    """Parity of every step graph, and the full step's output for the golden file."""
    found: dict[str, dict[str, float]] = {}
    output: Any = None
    for name, probe in probes.items():
        simulate = bool(qparams) and name == "full"
        context: contextlib.AbstractContextManager[None] = (
            quantized(linears, qparams) if simulate else contextlib.nullcontext()
        )
        with torch.no_grad(), context:
            expected = probe.module(*probe.feeds.values())
        tensors = expected if isinstance(expected, tuple) else (expected,)
        compared = dict(zip(probe.outputs, tensors, strict=True))
        if simulate:  # later slots see the flipped codes of earlier ones; the output counts
            compared = {"output": compared["output"]}
        found[name], outputs = parity.measure(
            folder / f"{name}.onnx", probe.feeds, compared, simulate
        )
        if name == "full":
            output = outputs["output"]
    return found, output


def _qparams(bundle: Bundle, model: LoadedModel) -> QParams:
    """The bundle's scales; empty where its recipe quantizes nothing."""
    quantization = bundle.manifest.quantization
    if quantization is not None:
        if quantization.made_from != bundle.manifest.fingerprint():
            raise BundleError(
                f"export: the scales in {bundle.path} are of another recipe; "
                f"compile the bundle again"
            )
        return load_qparams(bundle.file(quantization.file))
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
