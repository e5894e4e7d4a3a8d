"""Which kernel every quantized layer really runs in, by the runtime's own profiler."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.runtime.backends import Backend

GOLDEN_LIMIT_DB = 40.0  # other kernels flip a few codes; saturating ones do far worse
CAP_DB = 150.0


class LayerAudit(NamedTuple):
    """One layer that has to run in integers: the kernel that ran, or "missing"."""

    layer: str
    block: str
    kernel: str
    integer: bool
    latency_ms: float


class Audit(NamedTuple):
    """The verdict over one graph."""

    graph: str
    layers: tuple[LayerAudit, ...]
    golden_db: float  # how closely this machine repeats the step that export kept
    facts: dict[str, Any]

    @property
    def lost(self) -> tuple[LayerAudit, ...]:
        """Layers that are not in an integer kernel."""
        return tuple(layer for layer in self.layers if not layer.integer)

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
            "layers": [layer._asdict() for layer in self.layers],
            **self.facts,
        }


def audit(bundle: Bundle, backend: Backend, loop: str = "host") -> Audit:
    """Run `full.onnx` (or `sampler.onnx` for the graph loop) under the profiler.

    The manifest says which layers are quantized, so a layer that vanished is a failure too.
    """
    graph = "full" if loop == "host" else "sampler"
    path = bundle.graph(backend.target, graph)
    ran = {node: (kernel, ms) for node, kernel, ms in backend.profile(path, _feeds(bundle, graph))}
    quantization = bundle.manifest.quantization
    prefix = "" if graph == "full" else "full/"
    found = []
    for layer in quantization.layers if quantization is not None else ():
        kernel, ms = ran.get(f"{prefix}{layer.name}/MatMul", ("missing", 0.0))
        integer = kernel in backend.integer_kernels
        found.append(LayerAudit(layer.name, layer.block, kernel, integer, ms))
    return Audit(graph, tuple(found), _golden_db(bundle, backend), backend.facts())


def _golden_db(bundle: Bundle, backend: Backend) -> float:
    """PSNR, over the range, of one full step against the output that export wrote down."""
    golden, _ = tensors.load(bundle.file(bundle.manifest.golden[0]))
    feeds = {name: golden[f"input.{name}"] for name in ("sample", "features")}
    session = backend.session(bundle.graph(backend.target, "full"))
    found, wanted = session.run(feeds, ["output"])["output"], golden[f"output.{backend.target}"]
    error = np.square(found.astype(np.float64) - wanted).mean() / np.ptp(wanted) ** 2
    return float(-10 * np.log10(max(error, 10 ** (-CAP_DB / 10))))


def _feeds(bundle: Bundle, graph: str) -> dict[str, Any]:
    """Inputs of one image with guidance; the values do not matter."""
    model, recipe = bundle.manifest.model, bundle.manifest.recipe
    rng = np.random.default_rng(0)
    if graph == "full":
        return {
            "sample": rng.standard_normal((2, *model.sample_shape), np.float32),
            "features": rng.standard_normal((2, model.features), np.float32),
        }
    feeds: dict[str, Any] = {
        "noise": rng.standard_normal((1, *model.sample_shape), np.float32),
        "class_labels": np.zeros(1, np.int64),
        "guidance_scale": np.array(recipe.guidance, np.float32),
    }
    if recipe.sampler == "ddpm":
        shape = (recipe.steps, 1, *model.sample_shape)
        feeds["step_noise"] = rng.standard_normal(shape, np.float32)
    return feeds
