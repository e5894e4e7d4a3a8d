"""The parts of the page that are no plots: figures and pictures in the shape that it shows."""

from __future__ import annotations

import base64
import io
import math
import shlex
from collections import defaultdict
from typing import Any

import yaml
from PIL import Image

from ditcast.bundle import Bundle
from ditcast.manifest import REFERENCE
from ditcast.recipe import TEMPORAL, Recipe
from ditcast.runtime import charts, images
from ditcast.runtime.backends import ENGINES
from ditcast.runtime.images import Pixels
from ditcast.runtime.verdict import gains

PICTURE_BYTES = 2_000_000  # before base64; with plotly.js the page stays below 8 MB
STRIP_WIDTH = 200  # CSS pixels, about
REST = "everything else"
COLUMNS = 2  # of pictures in a strip
SOURCES = {  # --temporal: where all temporal features come from
    "fp": "computed in float",
    "naive": "computed by the quantized modules",
    "tib": "computed by the quantized modules",
    "cache": "stored for each step",
    "select": "stored for each step or computed by the quantized modules",
}

Values = dict[str, Any]


def strips(
    figures: Values, pictures: dict[str, Pixels], budget: int = PICTURE_BYTES
) -> list[Values]:
    """The pictures of each variant as PNG data, small enough for the page, two in a row."""
    found = [row for row in figures["variants"] if row["name"] in pictures]
    total = sum(len(pictures[row["name"]]) for row in found)
    result = []
    for row in found:
        shown = pictures[row["name"]]
        longest, size = math.isqrt(budget // (3 * total)), max(shown.shape[1:3])
        scale = min(1.0, longest / size)
        sheet = images.grid(shown, min(COLUMNS, len(shown)))
        if scale < 1:
            reduced = (round(sheet.width * scale), round(sheet.height * scale))
            sheet = sheet.resize(reduced, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        sheet.save(file, "PNG", optimize=True)
        result.append(
            {
                "row": row,
                "png": base64.b64encode(file.getvalue()).decode(),
                "count": len(shown),
                "reduced": scale < 1,
                "width": sheet.width,
                "zoom": max(1, STRIP_WIDTH // sheet.width),
                "cell": {
                    "width": shown.shape[2] * scale,
                    "height": shown.shape[1] * scale,
                    "gap": images.GAP * scale,
                    "columns": min(COLUMNS, len(shown)),
                },
            }
        )
    return result


def factors(figures: Values) -> list[Values]:
    """Full precision, each gain alone, both: what the interaction is about; else nothing."""
    made = gains(figures["variants"])
    if figures["interaction"] is None or len(made) < 3:
        return []
    names = ("full precision", "quantization only", "cache only", "both")
    rows = [figures["variants"][0], *made[:3]]
    return [{"title": title, "row": row} for title, row in zip(names, rows, strict=True)]


def inputs(found: Values | None) -> str:
    """Which input moves the most between the steps of calibration, and how many are clipped."""
    if found is None:
        return (
            "It was not recorded when this bundle was calibrated or measured, as earlier versions "
            "do not; another one of the same recipe has it."
        )
    if not found["largest"]:
        return "Every input stays in float."
    ran = {name: [value for value in row if value] for name, row in found["largest"].items()}
    moves = {name: max(row) / min(row) for name, row in ran.items() if row}
    name = max(moves, key=moves.__getitem__, default="")
    if not name:
        return "Every input is zero."
    high, low = (found["largest"][name].index(end(ran[name])) for end in (max, min))
    ratios = [
        value / limit
        for name, limits in found["representable"].items()
        for value, limit in zip(found["largest"][name], limits, strict=True)
        if value
    ]
    clipped = sum(ratio > charts.CLIPPED for ratio in ratios)
    return (
        f"{name} moves the most: its largest input is {moves[name]:.3g} times as large at step "
        f"{high} as at step {low}. {clipped} of {len(ratios)} are clearly above what their scale "
        f"can represent; the farthest is {max(ratios):.3g} times that."
    )


def audited(audit: Values) -> Values:
    """Kernels by their share of a full step, and the layers by how near they are to the roof."""
    roof = (
        audit["giga_ops"].get(str(max(audit["weight_bits"], 7))) if audit["weight_bits"] else None
    )
    steps = [layer for layer in audit["layers"] if not layer["layer"].startswith(TEMPORAL)]
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for layer in steps:
        runs = "integer" if layer["integer"] else "float"
        times[layer["kernel"], f"{layer['precision']} layer, {runs}"].append(layer["latency_ms"])
    for kernel, ms in audit["other_ms"].items():
        times[kernel, REST].append(ms)
    total = sum(map(sum, times.values())) or 1.0
    kernels = [
        {"kernel": kernel, "what": what, "ms": sum(ms), "share": sum(ms) / total}
        | {"layers": len(ms) if what != REST else 0}
        for (kernel, what), ms in times.items()
    ]
    layers = [
        layer | {"of_roof": layer["giga_ops"] / roof if roof and layer["giga_ops"] else None}
        for layer in audit["layers"]
    ]
    return {
        "kernels": sorted(kernels, key=lambda kernel: -kernel["ms"]),
        "layers": layers,
        "total_ms": total,
        "roof": roof,
        "float_roof": audit["giga_ops"].get("0"),
        "wanted": sum(layer["wanted"] for layer in audit["layers"]),
        "integer": sum(layer["wanted"] and layer["integer"] for layer in audit["layers"]),
        "golden_db": audit["golden_db"],
        "weight_bits": audit["weight_bits"],
    }


def facts(bundle: Bundle, figures: Values) -> dict[str, dict[str, str]]:
    """Everything the figures stand on: section -> key -> value."""
    model, described = bundle.manifest.model, figures["bundle"]
    machine = {key: value for key, value in figures["machine"].items() if key != "versions"}
    made = {
        "model": described["model"],
        "architecture": model.architecture,
        "parameters": f"{model.parameters:,}",
        "sample shape": " x ".join(map(str, model.sample_shape)),
        "classes": model.num_classes,
        "model fingerprint": model.fingerprint,
        "graphs made from": bundle.graphs_made_from(),
        "graphs and calibration, by which figures go stale": described["content"],
        # The page is part of the bundle, so it cannot hold the digest that vouches for itself.
        "bundle digest, before this report": described["digest"],
    }
    sections = {
        "Recipe": described["recipe"],
        "Request": figures["request"],
        "Distances": figures["distances"] or {},
        "Machine": machine,
        "Versions": figures["machine"]["versions"],
        "Versions that made the bundle": bundle.manifest.producer,
        "Backend": figures["backend"],
        "Bundle": made,
    }
    return {
        title: {key.replace("_", " "): plain(value) for key, value in values.items()}
        for title, values in sections.items()
        if values
    }


def plain(value: Any) -> str:
    """A value of JSON as words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(plain, value)) or "none"
    return "none" if value is None else str(value)


def command(bundle: Bundle, figures: Values) -> str:
    """The command that measures the same again, next to the bundle."""
    request, backend = figures["request"], figures["backend"]
    parts = ["ditcast", "bench", bundle.path.resolve().name]
    parts += ["--images", str(request["images"]), "--seed", str(request["seed"])]
    if request["steps"] != figures["bundle"]["recipe"]["steps"]:
        parts += ["--steps", str(request["steps"])]
    if figures["distances"] is not None:
        parts += ["--real", figures["distances"]["real"]]
    if backend["backend"] != "onnxruntime":
        parts += ["--backend", backend["backend"]]
    if backend.get("threads", figures["machine"]["cores"]) != figures["machine"]["cores"]:
        parts += ["--threads", str(backend["threads"])]
    if not backend.get("spin", True):
        parts += ["--no-spin"]
    return shlex.join(parts)


def recompile(bundle: Bundle, recipe: Recipe, backend: str) -> str:
    """The command that makes the bundle again: every recipe key that is not the default.

    Rules have no flag: a file of them is written before.
    """
    name = bundle.path.resolve().name
    parts = ["ditcast", "compile", bundle.manifest.model.source, "-o", name]
    for key, field in Recipe.model_fields.items():
        value = getattr(recipe, key)
        if value != field.default and key != "rules":
            parts += [f"--{key.replace('_', '-')}"]
            parts += map(str, value if isinstance(value, tuple) else [value])
    targets = {graph.target for graph in bundle.manifest.graphs} - {REFERENCE}
    if targets != {"onnxruntime"}:
        parts += [part for target in sorted(targets) for part in ("--target", target)]
    if backend not in ("onnxruntime", *ENGINES):  # engines are built of the finished bundle
        parts += ["--backend", backend]
    if not recipe.rules:
        return shlex.join(parts)
    file = f"{name}.yaml"
    rules = yaml.safe_dump({"rules": [rule.model_dump() for rule in recipe.rules]})
    made = shlex.join([*parts, "--recipe", file])
    return f"cat > {shlex.quote(file)} <<'END'\n{rules}END\n{made}"
