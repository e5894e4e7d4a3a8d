"""Which kernels the quantized layers of an engine became, by what its builder said."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from ditcast.bundle import Bundle
from ditcast.manifest import Engine, Layer
from ditcast.recipe import PRECISIONS
from ditcast.runtime.backends import layers_of as quantized_in
from ditcast.runtime.backends.enginelog import EngineLayer
from ditcast.runtime.engines import TARGET, find_engine, graphs_in, layers_of

MISSING = "missing"
KERNELS = ("gemm", "correlation")  # whole products; a fusion may hold one too
PRODUCTS = (*KERNELS, "runtime_fusion")
ATTENTION = "_gemm_mha"
# In the graph loop names of bodies and step graphs stand before a layer's.
NODE = re.compile(r"^(?:.+/)?(?P<layer>[^/]+)/(?P<kind>MatMul|Conv)(?:/\d+)?$")
BRANCH = " | "  # behind it stand the branch and the `If` that a node is in
OPERATORS = {"gemm": "gemm", "correlation": "convolution"}
INT4_BITS = 4
FP4 = "FP4E2M1"


class LayerKernel(NamedTuple):
    """One quantized layer: what it became, and what that was to be (INT8, INT4-weight or FP8)."""

    layer: str
    precision: str
    wanted: str
    kernel: str
    kept: bool


class EngineAudit(NamedTuple):
    """The verdict over one engine.

    `products` counts all its products by type and kind, `attention` its fused attentions by the
    type of their inputs.
    """

    graph: str
    engine: Engine
    layers: tuple[LayerKernel, ...]
    products: dict[str, int]
    attention: dict[str, int]

    @property
    def lost(self) -> tuple[LayerKernel, ...]:
        """Quantized layers that became wider floats, or that are not there."""
        return tuple(layer for layer in self.layers if not layer.kept)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "graph": self.graph,
            "passed": not self.lost,
            "backend": self.engine.backend,
            "version": self.engine.version,
            "device": self.engine.device,
            "weights_bytes": self.engine.weights_bytes,
            "build_s": self.engine.build_s,
            "products": self.products,
            "attention": self.attention,
            "layers": [layer._asdict() for layer in self.layers],
        }

    def lines(self) -> list[str]:
        """The verdict in words."""
        lines = [f"FLOAT {x.layer}: {x.kernel} (wanted {x.wanted})" for x in self.lost]
        kept = len(self.layers) - len(self.lost)
        lines.append(
            f"audit: {kept} of {len(self.layers)} quantized layers of {self.graph}.onnx kept their "
            f"precision in {self.engine.backend} {self.engine.version} for {self.engine.device}"
        )
        counted = {**self.products, **{f"{t} attention": n for t, n in self.attention.items()}}
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counted.items()))
        lines.append(
            f"audit: {self.graph}.onnx has {kinds}; {self.engine.weights_bytes / 2**20:.2f} MiB of "
            "weights"
        )
        return lines

    def rows(self) -> list[list[str]]:
        """A row per quantized layer."""
        return [
            [f"{x.layer} ({x.precision})", x.kernel, x.wanted if x.kept else "FLOAT"]
            for x in self.layers
        ]


HEADER = ["layer", "kernel", "runs in"]


def audit_engines(bundle: Bundle, backend: str, loop: str) -> list[EngineAudit]:
    """The engines that one control loop runs, as they were built last.

    Raises:
        BundleError: one is missing, stale or damaged.
    """
    found = []
    for graph in graphs_in(bundle):
        if (graph == "sampler") == (loop == "host"):
            continue
        inside = quantized_in(bundle, TARGET, graph)
        if graph not in ("full", "partial", "sampler") and not inside:
            continue
        engine = find_engine(bundle, backend, graph)
        found.append(audit_layers(graph, engine, inside, layers_of(bundle, engine)))
    return found


def audit_layers(
    graph: str, engine: Engine, expected: Sequence[Layer], layers: Sequence[EngineLayer]
) -> EngineAudit:
    """What became of the expected layers."""
    became: dict[str, list[tuple[str, EngineLayer]]] = {}
    products: Counter[str] = Counter()
    attention: Counter[str] = Counter()
    for layer in layers:
        if layer.name.startswith(ATTENTION):
            attention[_shown(layer.inputs[0])] += 1
        elif layer.kind in PRODUCTS and (kind := _kind(layer)):
            products[f"{_type(layer)} {kind}"] += 1
            for node in layer.nodes:
                if match := NODE.match(node.partition(BRANCH)[0]):
                    became.setdefault(match["layer"], []).append((match["kind"], layer))
    kernels = tuple(_verdict(layer, became.get(layer.name, [])) for layer in expected)
    return EngineAudit(graph, engine, kernels, dict(products), dict(attention))


def _kind(layer: EngineLayer) -> str:
    """Gemm or convolution; nothing for a fusion without a product."""
    if layer.kind in OPERATORS:
        return OPERATORS[layer.kind]
    if "Corr" in layer.name:
        return "convolution"
    return "gemm" if "Fc" in layer.name or "Gemm" in layer.name else ""


def _type(layer: EngineLayer) -> str:
    """What a product is multiplied in, or the weight that is unpacked inside it.

    The weight is a constant, but an input inside a loop. A fusion dequantizes what it reads.
    """
    kinds = (*layer.inputs, *layer.constants)
    if layer.kind in KERNELS and len(set(kinds[:2])) == 1:
        return _shown(kinds[0])
    if kinds[0] == FP4 and FP4 in layer.constants:  # beside each are the scales of its blocks
        return "FP4"
    if "Int4" in kinds:
        return "INT4-weight"
    return "half" if kinds[0] == "Half" and "Half" in kinds[1:] else "float"


def _shown(kind: str) -> str:
    return {"Float": "float", "Half": "half", "BFloat16": "bfloat16"}.get(kind, kind.upper())


def _verdict(expected: Layer, became: list[tuple[str, EngineLayer]]) -> LayerKernel:
    """One layer; where it became several products, all of them have to be what was wanted."""
    bits = PRECISIONS[expected.precision]
    convolution = any(kind == "Conv" for kind, _ in became)
    wanted = "INT4-weight" if bits.weight <= INT4_BITS and not convolution else "INT8"
    wanted = "FP8" if bits.e4m3 else wanted
    types = sorted({f"{_type(layer)} {_kind(layer)}" for _, layer in became})
    return LayerKernel(
        layer=expected.name,
        precision=expected.precision,
        wanted=wanted,
        kernel=", ".join(types) or MISSING,
        kept=bool(types) and all(kind.startswith(f"{wanted} ") for kind in types),
    )
