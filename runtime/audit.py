"""Which kernel every layer really runs in, how long it takes, and how far it is from the roof."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.cache.fitted import recipe_plan
from ditcast.cache.stepping import GRAPHS
from ditcast.cache.stepping import graphs as graphs_of
from ditcast.manifest import Layer
from ditcast.recipe import PRECISIONS, TEMPORAL
from ditcast.runtime.backends import Backend, GraphFile, NodeTime, graph_file, layers_of
from ditcast.sampling import needs_noise, with_null
from ditcast.schedule import from_config

GOLDEN_LIMIT_DB = 40.0  # other kernels flip a few codes; saturating ones do far worse
CAP_DB = 150.0
RUNS = 5
PRODUCT = re.compile("/(?:MatMul|Conv)")  # what a layer's product is called
FULL = (
    "full",
    "observe",
    "block",
    "rest",
    "partial",
    "sampler",
)  # what a full step, or a whole loop, runs
NOTHING = NodeTime("", "missing", 0.0)
RATE = GraphFile(path=Path(__file__).parent / "backends" / "rate.onnx")
RATE_SHAPE = (512, 1024, 4096)  # of its MatMuls, as `tools/make_probe.py` made them


class LayerAudit(NamedTuple):
    """One quantized layer: the kernel that ran, or "missing".

    `wanted` is whether it has to run in integers: a layer with a float input has only a smaller
    weight. Products of the TIB are too small to be rated.
    """

    layer: str
    block: str
    precision: str
    kernel: str
    integer: bool
    wanted: bool
    latency_ms: float
    share: float  # of all kernels of its graph
    giga_ops: float  # per second, counting a multiplication and an addition as two; or 0


class Audit(NamedTuple):
    """The verdict over one graph."""

    graph: str
    layers: tuple[LayerAudit, ...]
    other: dict[str, float]  # kernels of everything else: ms
    golden_db: float  # how closely this machine repeats the step that export kept
    rates: dict[int, float]  # weight bits (0 is float): Gop/s of a large MatMul on this machine
    weight_bits: int  # the widest that is multiplied as an integer, 0 where none is
    facts: dict[str, Any]

    @property
    def lost(self) -> tuple[LayerAudit, ...]:
        """Layers that should be in an integer kernel and are not, or that are not there."""
        return tuple(layer for layer in self.layers if _is_lost(layer))

    @property
    def roof(self) -> float | None:
        """Gop/s of a large MatMul of these weights; narrower ones run as fast as 7-bit ones."""
        return self.rates.get(max(self.weight_bits, 7)) if self.weight_bits else None

    @property
    def passed(self) -> bool:
        """Whether every quantized layer runs in integers, and computes what export computed."""
        return not self.lost and self.golden_db >= GOLDEN_LIMIT_DB

    def as_json(self) -> dict[str, Any]:
        """For `--json` and the report."""
        return {
            "graph": self.graph,
            "passed": self.passed,
            "golden_db": round(self.golden_db, 2),
            "weight_bits": self.weight_bits,
            "giga_ops": {str(bits): round(rate, 1) for bits, rate in self.rates.items()},
            "layers": [layer._asdict() for layer in self.layers],
            "other_ms": {kernel: round(ms, 4) for kernel, ms in self.other.items()},
            **self.facts,
        }


def _is_lost(layer: LayerAudit) -> bool:
    """Whether a layer should be in an integer kernel and is not, or is not there."""
    return (layer.wanted and not layer.integer) or layer.kernel == NOTHING.kernel


def audit(bundle: Bundle, backend: Backend, loop: str = "host") -> Audit:
    """Run the graphs of the plan's steps (or `sampler.onnx`, the graph loop) under the profiler.

    The manifest says which quantized layers a graph holds, so a layer that vanished is a failure
    too. Of a layer in several graphs the one that lost its integers is reported, if any. `backend`
    is that of a `Pipeline`, or of `make_backend`.

    Raises:
        BundleError: a graph is missing or stale, or the backend cannot load or run it.
        UnsupportedError: a backend of engines, which `ditcast audit` judges by their builder's log.
    """
    plan = recipe_plan(bundle.manifest)
    names = ("temporal", *graphs_of(plan)) if loop == "host" else ("sampler",)
    main = next(name for name in names if name in FULL)
    layers: dict[str, LayerAudit] = {}
    other: dict[str, float] = defaultdict(float)
    bits = 0
    for name in names:
        file = graph_file(bundle, backend.target, name)
        inside = layers_of(bundle, backend.target, name)
        if name != main and not inside:
            continue
        bits = max(bits, file.weight_bits)
        nodes = backend.profile(file, _feeds(bundle, backend, name), RUNS)
        rows = 1 if loop == "graph" and bundle.manifest.recipe.guidance <= 1 else 2
        found, rest = _layers(backend, nodes, inside, rows)
        layers |= {new.layer: new for new in found if new.layer not in layers or _is_lost(new)}
        for kernel, ms in rest.items() if name in FULL else ():
            other[kernel] += ms
    return Audit(
        main,
        tuple(layers.values()),
        dict(sorted(other.items(), key=lambda item: -item[1])),
        golden_step(bundle, backend)(),
        rates(backend),
        bits,
        backend.facts(),
    )


def _layers(
    backend: Backend, nodes: list[NodeTime], layers: Sequence[Layer], rows: int
) -> tuple[list[LayerAudit], dict[str, float]]:
    """The quantized layers of `rows` rows, and the time of all other kernels, longest first."""
    ran: dict[str, NodeTime] = {}
    other: dict[str, float] = defaultdict(float)
    expected = {layer.name: layer for layer in layers}
    for node in nodes:
        # Runtimes name what they fuse after the first node: LAYER/MatMul/... or LAYER/Conv/... In
        # the graph loop names of bodies and step graphs stand before it.
        head = PRODUCT.split(node.node)[0]
        name = head.rpartition("/")[2]
        if head != node.node and name in expected and node.ms > ran.get(name, NOTHING).ms:
            other[ran.get(name, NOTHING).kernel] += ran.get(name, NOTHING).ms
            ran[name] = node
        else:
            other[node.kernel] += node.ms
    other.pop(NOTHING.kernel, None)
    total = sum(node.ms for node in nodes)
    audits = []
    for name, layer in expected.items():
        node = ran.get(name, NOTHING)
        ops = 2.0 * rows * layer.positions * layer.shape[0] * layer.shape[1]
        rated = node.ms > 0 and not name.startswith(TEMPORAL)
        audits.append(
            LayerAudit(
                layer=name,
                block=layer.block,
                precision=layer.precision,
                kernel=node.kernel,
                integer=backend.is_integer(node.kernel),
                wanted=PRECISIONS[layer.precision].activation < 16,
                latency_ms=node.ms,
                share=node.ms / total,
                giga_ops=ops / node.ms / 1e6 if rated else 0.0,
            )
        )
    return audits, other


def rates(backend: Backend) -> dict[int, float]:
    """Gop/s of a large MatMul on this machine, by the bits of its weights; 0 is float."""
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((1, *RATE_SHAPE[:2]), np.float32)}
    found = {}
    for node in backend.profile(RATE, feeds, RUNS):
        bits, is_product, _ = node.node.partition("/MatMul")
        if is_product and bits.isdigit():
            found[int(bits)] = 2.0 * float(np.prod(RATE_SHAPE)) / node.ms / 1e6
    return dict(sorted(found.items()))


def golden_step(bundle: Bundle, backend: Backend) -> Callable[[], float]:
    """A function that runs the full step that export wrote down, and compares.

    It returns the PSNR over the range of the output that export got.
    """
    session = backend.session(graph_file(bundle, backend.target, "full"))
    feeds, wanted = _golden(bundle, backend.target)

    def run() -> float:
        found = session.run(feeds, ["output"])["output"]
        error = np.square(found.astype(np.float64) - wanted).mean() / np.ptp(wanted) ** 2
        return float(-10 * np.log10(max(error, 10 ** (-CAP_DB / 10))))

    return run


def _golden(bundle: Bundle, target: str) -> tuple[dict[str, Any], Any]:
    """Inputs and output of the full step that export wrote down."""
    golden, _ = tensors.load(bundle.file(bundle.manifest.golden[0]))
    prefix = f"{target}.input."
    feeds = {key.removeprefix(prefix): golden[key] for key in golden if key.startswith(prefix)}
    return feeds, golden[f"{target}.output"]


def _feeds(bundle: Bundle, backend: Backend, graph: str) -> dict[str, Any]:
    """Inputs of one image with guidance; the values do not matter."""
    model, recipe = bundle.manifest.model, bundle.manifest.recipe
    rng = np.random.default_rng(0)
    label = (bundle.manifest.stored_labels() or (0,))[0]
    if graph in GRAPHS:
        return _step_feeds(bundle, backend, graph)
    if graph == "temporal":
        steps = from_config(bundle.manifest.schedule).timesteps(recipe.steps)
        return {
            "timesteps": steps.astype(np.float32),
            "class_labels": np.array(with_null([label], model.null_label)),
        }
    feeds = {
        "noise": rng.standard_normal((1, *model.sample_shape), np.float32),
        "class_labels": np.array([label]),
        "guidance_scale": np.array(recipe.guidance, np.float32),
    }
    if needs_noise(recipe.sampler):
        shape = (recipe.steps, 1, *model.sample_shape)
        feeds["step_noise"] = rng.standard_normal(shape, np.float32)
    return feeds


def _step_feeds(bundle: Bundle, backend: Backend, graph: str) -> dict[str, Any]:
    """Inputs of a step graph for two rows: the golden step's, and zeros of what is kept."""
    model, history = bundle.manifest.model, recipe_plan(bundle.manifest).history
    golden = _golden(bundle, backend.target)[0]
    slot, slots = (2, *model.slot_shape), (len(model.slots), 2, *model.slot_shape)
    shapes = {"before": (history, *slot), "factors": (history,), "y": (history, *slots)}
    shapes |= {"a": slots, "slope": slots[:2]}
    inputs, _ = GRAPHS[graph].names(len(model.slots))
    feeds = {name: np.zeros(shapes.get(name, slot), np.float32) for name in inputs}
    if graph == "partial":
        feeds["mask"] = np.ones(len(model.slots), np.float32)
    feeds |= {name: golden[name][:2] for name in ("sample", "features") if name in feeds}
    if graph == "full":
        feeds |= {"ahead": golden["ahead"][:0, :2], "weights": golden["weights"][:0]}
    return feeds
