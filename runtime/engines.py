"""The engines of a bundle: built from its graphs, kept with it, and found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from ditcast.bundle import Bundle
from ditcast.cache.fitted import recipe_plan
from ditcast.cache.stepping import GRAPHS as STEPS
from ditcast.cache.stepping import graphs as graphs_of
from ditcast.errors import BundleError, ConfigError, UnsupportedError
from ditcast.manifest import Engine, Manifest, hash_file
from ditcast.progress import say
from ditcast.runtime.backends import GraphFile, graph_file
from ditcast.runtime.backends.enginelog import EngineLayer, parse_layers
from ditcast.runtime.backends.tensorrt import FLAGS, EngineBuilder, Profile, Range
from ditcast.runtime.trust import check_signature, sign
from ditcast.sampling import Coefficients, needs_noise

TARGET = "tensorrt"
GRAPHS = ("temporal", "full", "reuse", "partial", "add", "update", "sampler")
E4M3_SINCE = "8.9"  # the first compute capability that multiplies 8-bit floats
FOLDER = "engines"
SHOWN = 16  # digits of a key in the name of its plan


def profile_of(manifest: Manifest, graph: str) -> Profile:
    """Min, opt and max of every dynamic axis, from the recipe's batch, steps and cache.

    The rows of a step are those of a guided batch, and fewer are fine.
    """
    recipe, null = manifest.recipe, manifest.model.null_label
    guided = 1 if null is None else 2
    rows: Range = (1, recipe.batch * (guided if recipe.guidance > 1 else 1), recipe.batch * guided)
    if graph == "temporal":
        labels = min(recipe.batch, manifest.model.num_classes) + guided - 1
        return {
            "timesteps": {0: (1, recipe.steps, recipe.steps)},
            "class_labels": {0: (1, labels, labels)},
        }
    images, steps = (1, recipe.batch, recipe.batch), (1, recipe.steps, recipe.steps)
    if graph == "add":
        return {"part": {0: rows}, "older": {0: rows}}
    if graph == "update":
        known = {name: {0: steps} for name in (*Coefficients._fields, "gain", "offset")}
        noise = {"step_noise": {0: steps, 1: images}}
        if not needs_noise(recipe.sampler):
            del known["k_z"], noise["step_noise"]
        return {"x": {0: images}, "output": {0: rows}, **known, **noise}
    if graph == "sampler":
        noise = {"step_noise": {1: images}} if needs_noise(recipe.sampler) else {}
        return {"noise": {0: images}, "class_labels": {0: images}, **noise}
    step = {"sample": {0: rows}, "features": {0: rows}}
    if graph == "reuse":
        return {**step, "forecast": {0: rows}}
    if graph == "partial":
        inputs, _ = STEPS[graph].names(len(manifest.model.slots))
        return {**step, **{name: {0: rows} for name in inputs if name.startswith("cache.")}}
    longest = recipe_plan(manifest).ahead()[0].shape[1]
    later: Range = (0, longest, longest)
    return {**step, "ahead": {0: later, 1: rows}, "weights": {0: later}}


def graphs_in(bundle: Bundle) -> list[str]:
    """Those of `GRAPHS` that a bundle has: `partial` only where its cache runs it."""
    step = graphs_of(recipe_plan(bundle.manifest))
    return [name for name in GRAPHS if name != "partial" or name in step]


def build_engines(
    bundle: Bundle, builder: EngineBuilder, graphs: Sequence[str] = ()
) -> list[Engine]:
    """Build what is missing or stale of some graphs, or all, one engine after the other.

    Raises:
        BundleError: the bundle has no graphs for TensorRT, or stale ones.
        ConfigError: no such graph.
        UnsupportedError: TensorRT refuses one, the bundle's policy has graphs of its own, or its
            scheme is not for one of the builder's devices.
    """
    lacking = set(graphs_of(recipe_plan(bundle.manifest))) - {*GRAPHS}
    if lacking:
        raise UnsupportedError(
            f"backend {builder.name}: cache {bundle.manifest.recipe.cache} runs "
            f"{', '.join(sorted(lacking))}, for which no engines are built; compile a bundle with "
            "--cache output, taylor, fora or learned, or run this one with --backend onnxruntime"
        )
    known = graphs_in(bundle)
    graphs = graphs or known
    for name in graphs:
        if name not in known:
            raise ConfigError(f"graph: unknown {name!r}; expected one of {', '.join(known)}")
    _check_devices(bundle, builder, graphs)
    found = []
    for name in graphs:
        file = graph_file(bundle, TARGET, name)
        wanted = _describe(bundle, builder, name, file)
        held = [e for e in bundle.manifest.engines if e.key == wanted.key]
        if held:
            found.append(held[0])
            continue
        say(f"building {name}.onnx for {builder.device} with {builder.name} {builder.version}")
        found.append(_build(bundle, builder, wanted, file))
    return found


def _check_devices(bundle: Bundle, builder: EngineBuilder, graphs: Sequence[str]) -> None:
    """Refuse a device that does not multiply 8-bit floats, before the long work."""
    old = [c for c in builder.capabilities if _number(c) < _number(E4M3_SINCE)]
    for name in graphs if old else ():
        if graph_file(bundle, TARGET, name).e4m3:
            raise UnsupportedError(
                f"backend {builder.name}: scheme fp8 is not for this device: compute capability "
                f"{old[0]} multiplies no 8-bit floats, expected {E4M3_SINCE} or newer (RTX 40, L4, "
                "H100 and later); build for such devices only, or compile with --scheme w8a8"
            )


def _number(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def _made_from(file: GraphFile) -> str:
    """Hash of a graph and its weights."""
    return hashlib.sha256(file.identity.encode()).hexdigest()


def _describe(bundle: Bundle, builder: EngineBuilder, graph: str, file: GraphFile) -> Engine:
    """The engine that a build would give, without what only the build says."""
    made_from = _made_from(file)
    profile = {
        name: {str(axis): range_ for axis, range_ in axes.items()}
        for name, axes in profile_of(bundle.manifest, graph).items()
    }
    parts = [graph, made_from, builder.name, builder.version, builder.device, FLAGS, profile]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    stem = f"{FOLDER}/{builder.name}-{builder.version}-{builder.device}-{key[:SHOWN]}"
    return Engine(
        graph=graph,
        backend=builder.name,
        version=builder.version,
        device=builder.device,
        flags=FLAGS,
        profile=profile,
        made_from=made_from,
        key=key,
        path=f"{stem}.plan",
        layers=f"{stem}.layers.txt",
        weights_bytes=0,
        build_s=0.0,
    )


def _build(bundle: Bundle, builder: EngineBuilder, wanted: Engine, file: GraphFile) -> Engine:
    built = builder.build(file, profile_of(bundle.manifest, wanted.graph))
    engine = wanted.model_copy(
        update={"weights_bytes": built.weights_bytes, "build_s": built.build_s}
    )
    plan = bundle.staged(engine.path)
    plan.write_bytes(built.plan)
    bundle.staged(engine.layers).write_text(built.listing)
    engine = engine.model_copy(update={"signature": sign(engine, hash_file(plan))})
    kept: list[Engine] = []
    stale: list[Engine] = []
    for other in bundle.manifest.engines:
        same = (other.graph, other.backend) == (engine.graph, engine.backend)
        old = same and (other.made_from != engine.made_from or other.device == engine.device)
        (stale if old else kept).append(other)
    replaces = tuple(name for other in stale for name in (other.path, other.layers))
    bundle.commit({"engines": (*kept, engine)}, replaces)
    return engine


def find_engine(bundle: Bundle, backend: str, graph: str, device: str = "") -> Engine:
    """The engine of a graph, built of the graph that the bundle holds now.

    `device` is such as sm89; without one, any engine of that backend.

    Raises:
        BundleError: there is none, or none for this device; says what builds it.
    """
    again = f"run: ditcast build {bundle.path} --backend {backend}"
    made_from = _made_from(graph_file(bundle, TARGET, graph))
    engines = [e for e in bundle.manifest.engines if (e.graph, e.backend) == (graph, backend)]
    if not engines:
        raise BundleError(f"engine: {bundle.path} has none of {graph}.onnx for {backend}; {again}")
    current = [engine for engine in engines if engine.made_from == made_from]
    if not current:
        raise BundleError(f"engine: that of {graph}.onnx is of an older graph; {again}")
    fitting = [e for e in current if not device or device in e.device.split("+")]
    if not fitting:
        built = ", ".join(engine.device for engine in current)
        raise BundleError(
            f"engine: that of {graph}.onnx is for {built}, and this GPU is {device}; {again}"
        )
    return fitting[-1]


def load_plan(bundle: Bundle, engine: Engine, version: str, *, trust: bool = False) -> bytes:
    """A plan that may be run here.

    Raises:
        BundleError: it is of another version, is damaged, or was built by somebody else and is not
            to be trusted.
    """
    if engine.version != version:
        raise BundleError(
            f"engine: {engine.path} is of {engine.backend} {engine.version}, and {version} is "
            f"installed; run: ditcast build {bundle.path} --backend {engine.backend}"
        )
    bundle.check(engine.path)
    if not trust:
        check_signature(engine, bundle.manifest.files[engine.path])
    return bundle.file(engine.path).read_bytes()


def layers_of(bundle: Bundle, engine: Engine) -> list[EngineLayer]:
    """What the builder said that it made of the graph.

    Raises:
        BundleError: the file is damaged.
        UnsupportedError: it reads otherwise than known versions write it.
    """
    bundle.check(engine.layers)
    return parse_layers(bundle.file(engine.layers).read_text())
