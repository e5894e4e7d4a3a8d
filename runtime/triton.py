"""A bundle as a model repository of Triton Inference Server: what `ditcast deploy` writes.

The host loop is a model of Triton's Python backend. The graph loop is one of its onnxruntime
backend, or, where that one would not compute what was calibrated, of the Python backend too.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ditcast.bundle import Bundle
from ditcast.cache.fitted import recipe_plan
from ditcast.cache.stepping import graphs as graphs_of
from ditcast.errors import BundleError, ConfigError
from ditcast.manifest import MANIFEST, WEIGHTS, Engine, Manifest, render
from ditcast.options import ENGINE_BACKENDS
from ditcast.recipe import PRECISIONS
from ditcast.runtime.backends import layers_of
from ditcast.runtime.engines import TARGET, find_engine
from ditcast.runtime.triton_readme import readme
from ditcast.runtime.trust import check_signature
from ditcast.sampling import needs_noise

SOURCE = Path(__file__).parent / "triton_model.py"
ONNXRUNTIME = "onnxruntime"  # the backend of that name in ditcast, and in Triton
BACKENDS = (ONNXRUNTIME, *ENGINE_BACKENDS)
VERSION = "1"  # of a model, as Triton counts them
SAMPLER = "sampler"
FOR_ALL = 0o755


@dataclass(frozen=True)
class Port:
    """An input or an output of a model; a dimension of -1 is any."""

    name: str
    kind: str
    dims: tuple[int, ...]
    optional: bool = False

    def text(self) -> str:
        """As one line of `config.pbtxt`."""
        dims = ", ".join(map(str, self.dims))
        rest = " optional: true" if self.optional else ""
        return f'  {{ name: "{self.name}" data_type: TYPE_{self.kind} dims: [ {dims} ]{rest} }}'


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of the repository, run by a backend of Triton's."""

    name: str
    backend: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parameters: dict[str, str]

    def config(self) -> str:
        """The text of `config.pbtxt`.

        One request is one batch: a dynamic cache decides for a whole batch, so that Triton must
        not join requests. The Python process picks its GPU itself, hence KIND_CPU there too.
        """
        values = [
            f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
            for key, value in self.parameters.items()
        ]
        lines = [
            f'name: "{self.name}"',
            f'backend: "{self.backend}"',
            "max_batch_size: 0",
            *("input [", ",\n".join(port.text() for port in self.inputs), "]"),
            *("output [", ",\n".join(port.text() for port in self.outputs), "]"),
            "instance_group [ { kind: KIND_CPU count: 1 } ]",
            *values,
        ]
        return "\n".join(lines) + "\n"


def deploy(
    bundle: Bundle, place: Path, *, backend: str = ONNXRUNTIME, trust: bool = False
) -> tuple[str, ...]:
    """Write the model repository `place`, all of it or nothing; returns its models' names.

    Raises:
        ConfigError: `place` holds something, lies in the bundle, or has no parent folder.
        BundleError: the bundle lacks graphs or engines, they are stale, or a file is damaged.
    """
    place = place.resolve()
    _check_place(bundle, place)
    engines = _check_parts(bundle, backend, trust)
    stem = name_of(bundle)
    host = _python_model(bundle, f"{stem}_host", backend, "host")
    reason = by_python(bundle, backend)
    graph = _graph_model(bundle, f"{stem}_graph")
    if reason:
        graph = _python_model(bundle, f"{stem}_graph", backend, "graph")
    partial = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        for model in (host, graph):
            folder = partial / model.name / VERSION
            folder.mkdir(parents=True)
            (folder.parent / "config.pbtxt").write_text(model.config())
            if model.backend == "python":
                shutil.copyfile(SOURCE, folder / "model.py")
                wanted = [e for e in engines if (e.graph == SAMPLER) == (model is graph)]
                _copy_bundle(bundle, folder / "bundle", target_of(backend), wanted)
            else:
                _copy(bundle, bundle.graph(ONNXRUNTIME, SAMPLER), folder / "model.onnx")
                _copy(bundle, bundle.file(f"graphs/{ONNXRUNTIME}/{WEIGHTS}"), folder / WEIGHTS)
        text = readme(bundle.manifest, stem, backend=backend, engines=engines, reason=reason)
        (partial / "README.md").write_text(text)
        partial.chmod(FOR_ALL)  # the server may run as another user
        partial.replace(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return host.name, graph.name


def name_of(bundle: Bundle) -> str:
    """What the models of a bundle are called, before `_host` and `_graph`."""
    stem = bundle.path.resolve().name.removesuffix(".bundle")
    return re.sub(r"[^A-Za-z0-9-]+", "_", stem).strip("_") or "bundle"


def target_of(backend: str) -> str:
    """Whose graphs a backend runs."""
    return TARGET if backend in ENGINE_BACKENDS else backend


def by_python(bundle: Bundle, backend: str) -> str:
    """Why the graph loop cannot be left to a backend of Triton's own; empty where it can."""
    if backend in ENGINE_BACKENDS:
        return (
            "Triton's tensorrt backend loads no engine that has an input without dimensions, "
            "as `guidance_scale` is, nor one of TensorRT for RTX"
        )
    held = {layer.precision for layer in layers_of(bundle, ONNXRUNTIME, SAMPLER)}
    if any(PRECISIONS[kind].activation == 16 and PRECISIONS[kind].weight for kind in held):
        return (
            "Triton's onnxruntime backend cannot set the session option that keeps the inputs of "
            "4-bit weights in float"
        )
    return ""


def _check_place(bundle: Bundle, place: Path) -> None:
    if place.exists() and not place.is_dir():
        raise ConfigError(f"deploy: {place} is a file; name a new directory")
    if place.is_dir() and any(place.iterdir()):
        raise ConfigError(
            f"deploy: {place} is not empty; name a new directory, or remove what is there"
        )
    if not place.parent.is_dir():
        raise ConfigError(f"deploy: no folder {place.parent}; create it first")
    if place.is_relative_to(bundle.path.resolve()):
        raise ConfigError(
            f"deploy: {place} lies in the bundle, which may hold nothing else; "
            "name a directory outside it"
        )


def _check_parts(bundle: Bundle, backend: str, trust: bool) -> list[Engine]:
    """The engines that are needed, once everything that is needed is known to be there."""
    names = ("temporal", *graphs_of(recipe_plan(bundle.manifest)), SAMPLER)
    for name in names:
        bundle.graph(target_of(backend), name)
    if backend not in ENGINE_BACKENDS:
        return []
    current = {name: find_engine(bundle, backend, name).made_from for name in names}
    engines = [engine for engine in bundle.manifest.engines if engine.backend == backend]
    found = [engine for engine in engines if current.get(engine.graph) == engine.made_from]
    for engine in found:
        if not trust:
            check_signature(engine, bundle.manifest.files[engine.path])
    return found


def _python_model(bundle: Bundle, name: str, backend: str, loop: str) -> Model:
    options = {"seed": "INT64", "first": "INT64", "guidance": "FP32", "steps": "INT32"}
    return Model(
        name=name,
        backend="python",
        inputs=(
            Port("labels", "INT64", (-1,)),
            *(Port(key, kind, (1,), optional=True) for key, kind in options.items()),
        ),
        outputs=(Port("samples", "FP32", (-1, *bundle.manifest.model.sample_shape)),),
        parameters={"backend": backend, "loop": loop, "threads": "0"},
    )


def _graph_model(bundle: Bundle, name: str) -> Model:
    """`sampler.onnx` itself; its scalar is written as [ 1 ], since Triton knows no scalars."""
    recipe, images = bundle.manifest.recipe, (-1, *bundle.manifest.model.sample_shape)
    noises = (Port("step_noise", "FP32", (recipe.steps, *images)),)
    return Model(
        name=name,
        backend=ONNXRUNTIME,
        inputs=(
            Port("noise", "FP32", images),
            Port("class_labels", "INT64", (-1,)),
            Port("guidance_scale", "FP32", (1,)),
            *(noises if needs_noise(recipe.sampler) else ()),
        ),
        outputs=(Port("latents", "FP32", images),),
        parameters={"intra_op_thread_count": "0"},
    )


def _copy(bundle: Bundle, source: Path, place: Path) -> None:
    """Copy a file of the bundle whose hash is right."""
    bundle.check(source.relative_to(bundle.path).as_posix())
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, place)


def _copy_bundle(bundle: Bundle, place: Path, target: str, engines: list[Engine]) -> None:
    """Write a bundle of what one backend needs: no reference, no reports."""
    held = bundle.manifest
    kept = {name for engine in engines for name in (engine.path, engine.layers)}
    kept |= {part.file for part in (held.quantization, held.cache) if part is not None}
    folder = f"graphs/{target}/"
    files = {n: entry for n, entry in held.files.items() if n.startswith(folder) or n in kept}
    update = {
        "graphs": tuple(graph for graph in held.graphs if graph.target == target),
        "engines": tuple(engines),
        "golden": (),
        "reports": (),
        "files": files,
    }
    small: Manifest = held.model_copy(update=update).sealed()
    for name in files:
        _copy(bundle, bundle.file(name), place / name)
    (place / MANIFEST).write_text(render(small.model_dump(mode="json")))
    if Bundle.open(place).manifest != small:
        raise BundleError(f"deploy: {place} does not read back as it was written; check the disk")
