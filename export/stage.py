"""The export stage: model and scales in, verified ONNX graphs of every target out."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from torch import Tensor

from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.cache.fitted import Fitted, missing, of_target
from ditcast.cache.stepping import graphs
from ditcast.calibrate.qparams import QParams, of_bundle
from ditcast.calibrate.simulate import Simulation, quantized
from ditcast.errors import BundleError
from ditcast.export import parity
from ditcast.export.between import BETWEEN, add_graph, update_graph
from ditcast.export.body import LoopSpec
from ditcast.export.branching import branch
from ditcast.export.forecast import multiply
from ditcast.export.loop import sampler_graph
from ditcast.export.probes import Probe, between_probes, loop_probe, make_probes, short_steps
from ditcast.export.quantize import insert_qdq
from ditcast.export.store import WeightStore, check_disk
from ditcast.export.targets import TARGETS, check_products, check_weights, encodings
from ditcast.export.tensorrt import KEPT, lower
from ditcast.export.trace import trace
from ditcast.manifest import REFERENCE, WEIGHTS, Graph
from ditcast.models import Adapter, LoadedModel
from ditcast.models.base import Layer, is_near
from ditcast.progress import say
from ditcast.recipe import FLOAT, TEMPORAL
from ditcast.runtime.backends import GraphFile
from ditcast.sampling import coefficients, needs_noise
from ditcast.schedule import from_config

DEFAULT_TARGETS = ("onnxruntime",)
GOLDEN = "golden/step.safetensors"
BRANCHED = ("partial",)  # graphs that compute what is asked for only
SHORT = "short"  # a graph loop that is only there while parity is measured


def to_onnx(bundle: Bundle, model: LoadedModel, targets: Sequence[str] = DEFAULT_TARGETS) -> None:
    """Export the graphs of `targets` and of full precision; only what is missing or stale.

    Raises:
        ConfigError: no such target, or one that cannot run the recipe's scheme.
        UnsupportedError: a target that cannot hold a layer's 4-bit weights.
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
    bits = {name: held.bits for name, held in qparams.layers.items()}
    check_weights(due, model.adapter, bits, bundle.manifest.recipe.group)
    if missing(bundle.manifest):
        raise BundleError(
            f"export: {bundle.path} is not calibrated for its cache; "
            f"run: ditcast calibrate {model.source} -o {bundle.path}"
        )
    found = [graph for graph in bundle.manifest.graphs if graph.target in held]
    golden: dict[str, Any] = {}
    if held:
        golden, _ = tensors.load(bundle.file(GOLDEN))
    floats: dict[str, gs.Graph] = {}
    for targets, scales in encodings(model.adapter, due, qparams):
        found += _export(bundle, model, targets, scales, golden, floats=floats)
    tensors.save(golden, bundle.staged(GOLDEN))
    replaces = "" if held else "graphs/"
    bundle.commit({"graphs": tuple(found), "golden": (GOLDEN,)}, replaces)


def _due(bundle: Bundle, targets: Sequence[str]) -> tuple[list[str], set[str]]:
    """The targets to export, and those that the bundle holds and keeps."""
    check_products(targets, bundle.manifest.recipe)
    graphs, made_from = bundle.manifest.graphs, bundle.graphs_made_from()
    held = {graph.target for graph in graphs}
    wanted = held | {REFERENCE, *targets}
    if any(graph.made_from != made_from for graph in graphs):
        held = set()
    has = {(graph.target, graph.name) for graph in graphs}
    for target in [target for target in held if TARGETS[target].typed]:
        if not has >= {(target, name) for name in BETWEEN}:  # an older version wrote it
            held.remove(target)
    return [target for target in TARGETS if target in wanted - held], held


def _export(
    bundle: Bundle,
    model: LoadedModel,
    targets: Sequence[str],
    qparams: QParams,
    golden: dict[str, Any],
    *,
    floats: dict[str, gs.Graph],
) -> list[Graph]:
    """Stage the graphs of targets that encode the same numbers; adds their golden steps.

    `floats` are traced graphs that serve wherever Q/DQ nodes make all of the difference.
    """
    found, adapter = [], model.adapter
    with quantized(adapter, qparams) as simulation:
        probes = make_probes(bundle, adapter)
        traced = _traced(probes, qparams, simulation, floats)
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
                measured = probes | {"sampler": loop_probe(bundle, adapter, fitted)}
            if TARGETS[target].typed:
                measured = measured | between_probes(bundle, adapter)
            measured = {name: measured[name] for name in _graphs_of(target, measured)}
            held = {name: _layers_in(graph, simulation.layers) for name, graph in traced.items()}
            held |= {"sampler": tuple(simulation.layers), **dict.fromkeys(BETWEEN, ())}
            half = TARGETS[target].typed
            parities, output = _compare(adapter, folder, measured, simulation, held, half=half)
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
                    layers=held[name],
                )
                for name, parity in parities.items()
            ]
    return found


def _traced(
    probes: dict[str, Probe],
    qparams: QParams,
    simulation: Simulation,
    floats: dict[str, gs.Graph],
) -> dict[str, gs.Graph]:
    """All step graphs; those that serve again are taken from `floats`, or put there."""
    same = {name for name in probes if _traces_as_float(name, qparams, simulation.originals)}
    due = [name for name in probes if name not in same & floats.keys()]
    if due:
        say("exporting: tracing the model")
    fresh = {name: _trace(probes[name], simulation) for name in due}
    floats |= {name: graph for name, graph in fresh.items() if name in same}
    known = floats | fresh
    return {name: known[name] for name in probes}


def _traces_as_float(graph: str, qparams: QParams, originals: dict[str, Layer]) -> bool:
    """Whether a traced graph is that of full precision, but for weights that Q/DQ replaces.

    That of the temporal features is not where these change. A step graph is not where channels are
    balanced, where a scale per step takes rows of its own, where inputs are clipped to fewer than
    8 bits, and where the bias of a convolution is added behind it.
    """
    if qparams.balance:
        return False
    layers = qparams.layers.items()
    if graph == "temporal":
        inside = any(name.startswith(TEMPORAL) or scales.stepwise for name, scales in layers)
        return not (inside or qparams.outputs or qparams.stored)
    return not any(
        scales.stepwise
        or originals[name].weight.dim() > 2
        or (scales.activation is not None and scales.bits.activation < 8)
        for name, scales in layers
        if not name.startswith(TEMPORAL)
    )


def _trace(probe: Probe, simulation: Simulation) -> gs.Graph:
    """One step graph without any rounding of inputs."""
    with simulation.exact():
        return trace(
            probe.module,
            list(probe.feeds.values()),
            inputs=list(probe.feeds),
            outputs=probe.outputs,
            dynamic=probe.dynamic,
            layers=simulation.originals,
        )


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
        for name in _graphs_of(target, traced):
            graph = traced[name].copy()
            held = _layers_in(graph, qparams.layers)
            layers = {layer: qparams.layers[layer] for layer in held}
            if layers:
                insert_qdq(graph, layers, TARGETS[target], originals, group)
            if TARGETS[target].typed:
                lower(graph, name)
            path = folder / f"{name}.onnx"
            store.save(graph, path)
            if name in BRANCHED:
                store.save_proto(branch(onnx.load(path, load_external_data=False)), path)
            elif name == "full" and TARGETS[target].multiplies:
                proto = onnx.load(path, load_external_data=False)
                store.save_proto(multiply(proto, adapter.slot_shape), path)
        parts = {
            name: onnx.load(folder / f"{name}.onnx", load_external_data=False)
            for name in ("temporal", *graphs(fitted.plan(bundle.manifest)))
        }
        loops = (("sampler", bundle.manifest.recipe.steps), (SHORT, short_steps(bundle)))
        for name, steps in loops if TARGETS[target].loop else ():
            spec = _loop_spec(bundle, adapter, parts, fitted, steps)
            spec = replace(spec, fixed_rows=TARGETS[target].typed)
            store.save_proto(sampler_graph(spec), folder / f"{name}.onnx")
        if TARGETS[target].typed:
            spec = _loop_spec(bundle, adapter, parts, fitted, bundle.manifest.recipe.steps)
            store.save_proto(add_graph(spec), folder / "add.onnx")
            update = update_graph(spec, adapter.output_channels)
            store.save_proto(update, folder / "update.onnx")


def _graphs_of(target: str, names: Iterable[str]) -> list[str]:
    """Those of the graphs that a target has: without a graph loop it takes no branches either."""
    return [name for name in names if TARGETS[target].loop or name not in BRANCHED]


def _layers_in(graph: gs.Graph, layers: Iterable[str]) -> tuple[str, ...]:
    """Those of the layers that a graph holds."""
    products = {node.name.rpartition("/")[0] for node in graph.nodes}
    return tuple(name for name in layers if name in products)


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
        graphs=parts,
        plan=plan.first(steps),
        timesteps=schedule.timesteps(recipe.steps)[:steps],
        table=coefficients(schedule, recipe.sampler, recipe.steps)[:steps],
        clip=schedule.clip,
        null_label=adapter.null_label,
        sample_shape=adapter.sample_shape,
        slot_shape=adapter.slot_shape,
        output_channels=adapter.output_channels,
        step_noise=needs_noise(recipe.sampler),
        gain=None if fitted.gain is None else fitted.gain[:steps],
        offset=None if fitted.offset is None else fitted.offset[:steps],
    )


def _compare(
    adapter: Adapter,
    folder: Path,
    probes: dict[str, Probe],
    simulation: Simulation,
    held: dict[str, tuple[str, ...]],
    *,
    half: bool,
) -> tuple[dict[str, dict[str, float]], Any]:
    """Parity of every graph, and the full step's output for the golden file.

    `held` are the quantized layers of each graph.

    The graph loop is compared over its first steps, a full one and one that follows: the whole
    trajectory of a large model would take many minutes.
    """
    found: dict[str, dict[str, float]] = {}
    golden: Any = None
    short = folder / f"{SHORT}.onnx"
    rounding = {name for name, layer in simulation.layers.items() if layer.scale is not None}
    for name, probe in probes.items():
        unquantized, whole = None, None
        if rounding & {*held[name]}:
            unquantized = {}
            # Behind more than the first layers, only closeness of the whole can be asked.
            if is_near(adapter, name):
                probe = probe.first_slot() if name == "full" else probe
                output = probe.outputs[-1]
                unquantized = {output: _exactly(probe, simulation)[output]}
            elif name == "sampler":  # of step graphs that have been compared by themselves
                whole = functools.partial(_exactly, probe, simulation)
        path = short if name == "sampler" else folder / f"{name}.onnx"
        e4m3 = any(simulation.layers[layer].e4m3 for layer in held[name])
        found[name], outputs = parity.measure(
            GraphFile(path=path, e4m3=e4m3),
            probe.feeds,
            probe.run(),
            unquantized,
            whole,
            half=half and name != KEPT,
        )
        if name == "full":
            golden = outputs["output"]
    short.unlink(missing_ok=True)
    return found, golden


def _exactly(probe: Probe, simulation: Simulation) -> dict[str, Tensor]:
    with simulation.exact():
        return probe.run()


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
