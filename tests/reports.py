"""Figures as `bench` gives them, made by hand in milliseconds, with pictures to plant faults in."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.manifest import Graph, Layer
from ditcast.runtime import fidelity, kept
from ditcast.runtime.report import write_report
from tests import bundles

NAMES = ("full precision", "w8a8", "cache", "w8a8 + cache", "3 steps")
# name: target, cache, full steps, steps, ms per image, speed-up, PSNR
ROWS: dict[str, tuple[str, str, int, int, float, float, float]] = {
    "full precision": ("reference", "none", 6, 6, 41.7, 1.0, 100.0),
    "w8a8": ("onnxruntime", "none", 6, 6, 53.3, 0.78, 45.2),
    "cache": ("reference", "fora", 3, 6, 22.9, 1.82, 27.6),
    "w8a8 + cache": ("onnxruntime", "fora", 3, 6, 18.4, 2.27, 26.1),
    "3 steps": ("reference", "none", 3, 3, 19.6, 2.13, 21.3),
}
MAX_BYTES = 8_000_000  # of a page
LAYERS = ("blocks.0.attn.qkv", "blocks.0.mlp.fc1")


def spread(middle: float) -> dict[str, float]:
    """A spread around a median."""
    return {"p10": middle * 0.9, "p50": middle, "p90": middle * 1.1}


def row(name: str) -> dict[str, Any]:
    """The figures of one variant, as `bench` gives them."""
    target, cache, full, steps, ms, speedup, psnr = ROWS[name]
    return {
        "name": name,
        "target": target,
        "cache": cache,
        "steps": steps,
        "full_steps": full,
        "idle": None,
        "spacing": "trailing" if steps == 3 else None,
        "image_ms": spread(ms),
        "full_step_ms": spread(ms / full),
        "reuse_step_ms": spread(0.7) if cache == "fora" else None,
        "speedup": spread(speedup),
        "psnr_db": spread(psnr),
        "ssim": spread(0.876),
        "contrast": spread(0.99),
        "detail": spread(1.02),
        "broken": {"flat": 0, "blurred": 0, "noisy": 0},
        **dict.fromkeys(fidelity.DISTANCES),
        "samples": 160,
        "size_bytes": (3 if target == "reference" else 1) << 20,
        "peak_memory_mib": 234.5,
    }


def steps(names: tuple[str, ...]) -> dict[str, Any]:
    """What happens in six steps of four slots; the noise guard has held one forecast back."""
    cached, quantized = "cache" in " ".join(names), "w8a8" in names
    slots = [f"blocks.{i}.{part}" for i in range(2) for part in ("attn", "mlp")]
    errors = [[0, 0.1, 0, 0.3, 0, 0.5]] * 4
    reused = [[0, 0.2, 0, 0.25 if slot == 2 else 0.4, 0, 0.6] for slot in range(4)]
    return {
        "timesteps": [999, 832, 666, 500, 333, 166],
        "slots": slots,
        "plan": ["frfpfp", "frfpfp", "frfhfp", "frfpfp"] if cached else None,
        "closeness_db": {name: [60.0, 50, 40, 38, 35, 30] for name in names[1:4]},
        "feature_cosine": [0.9991, 0.9994, 0.9996, 0.9997, 0.9998, 1.0] if quantized else None,
        "forecast_error": errors if cached else None,
        "reuse_error": reused if cached else None,
        "inputs": {
            "timesteps": [999, 832, 666, 500, 333, 166],
            "largest": {
                LAYERS[0]: [12.7, 25.4, 30, 38.1, 50.8, 63.5],
                LAYERS[1]: [4, 0, 5, 0, 4, 0],
            },
            "representable": {
                LAYERS[0]: [12.7, 25.4, 25.4, 38.1, 50.8, 63.5],
                LAYERS[1]: [5.0] * 6,
            },
        }
        if quantized
        else None,
        "ranges": {"blocks.0.attn.qkv": [0.1, 0.2, 0.2, 0.3, 0.4, 0.5]} if cached else {},
        "selection": None,
    }


def make_report(bundle: Bundle, *names: str, shape: tuple[int, ...] = (4, 3, 8, 8)) -> Any:
    """A report of some variants with random samples."""
    rng = np.random.default_rng(0)
    model, recipe = bundle.manifest.model, bundle.manifest.recipe
    rows = [row(name) for name in names]
    both = {"speedup": spread(1.6), "psnr_db": spread(-0.4), "samples": 160}
    return {
        "machine": {
            "cpu": "Test CPU",
            "cpu_flags": ["avx2"],
            "cores": 2,
            "memory_gib": 8.0,
            "system": "Linux x86_64",
            "python": "3.11",
            "versions": {"numpy": "2.0"},
            "date": "2026-01-02",
        },
        "backend": {"backend": "onnxruntime", "threads": 2, "integer_mode": "u8 x s8"},
        "bundle": {
            "model": model.source,
            "fingerprint": model.fingerprint,
            "digest": bundle.manifest.digest,
            "content": bundle.content(row["target"] for row in rows),
            "recipe": recipe.model_dump(mode="json"),
            "random_weights": False,
        },
        "request": {"images": 160, "batch": 2, "steps": 6, "guidance": 2.0, "seed": 7},
        "variants": rows,
        "distances": None,
        "interaction": both if {"w8a8", "cache", "w8a8 + cache"} <= set(names) else None,
        "unpaired_psnr_db": spread(8.0),
        "cost": {
            "calibrate": {"seconds": 93.1, "peak_memory_mib": 1024.0}
            | {"parts": {"trajectories and ranges": 90.2, "cache: correction": 2.9}},
            "export": {"seconds": 12.3, "peak_memory_mib": 2048.0, "parts": {}},
        },
        "steps": steps(names),
        "pictures": None
        if shape[1] != 3
        else {"count": shape[0], "height": shape[2], "width": shape[3]},
        "shown": {name: rng.uniform(-1, 1, shape).astype(np.float32) for name in names},
    }


def audited() -> dict[str, Any]:
    """What an audit says where everything is as it should be."""
    layers = [
        {
            "layer": name,
            "block": name.rpartition(".")[0],
            "precision": "w8a8",
            "kernel": "MatMulIntegerToFloat",
            "integer": True,
            "wanted": True,
            "latency_ms": 0.25,
            "share": 0.3,
            "giga_ops": 400.0,
        }
        for name in LAYERS
    ]
    return {
        "graph": "full",
        "passed": True,
        "golden_db": 120.0,
        "weight_bits": 8,
        "giga_ops": {"0": 180.0, "7": 700.0, "8": 650.0},
        "layers": layers,
        "other_ms": {"Softmax": 0.2, "LayerNormalization": 0.1},
        "backend": "onnxruntime",
        "threads": 2,
    }


def exported(bundle: Bundle) -> Bundle:
    """The handmade bundle with quantized layers and graphs of the target onnxruntime."""
    quantization = bundle.manifest.quantization
    assert quantization is not None
    layers = tuple(
        Layer(name=name, block="", precision="w8a8", shape=(4, 4), positions=16) for name in LAYERS
    )
    path = "graphs/onnxruntime/full.onnx"
    bundles.stage(bundle, {path: b"integers" * 20})
    graph = Graph(
        target="onnxruntime",
        name="full",
        path=path,
        made_from=bundle.graphs_made_from(),
        parity={"psnr_db": 60.0},
    )
    quantized = quantization.model_copy(update={"layers": layers})
    bundle.commit({"quantization": quantized, "graphs": (*bundle.manifest.graphs, graph)})
    return bundle


def keep(bundle: Bundle, report: dict[str, Any], audit: dict[str, Any] | None = None) -> None:
    """Put figures without pictures into a bundle, and an audit beside them."""
    figures = {key: value for key, value in report.items() if key != "shown"}
    bundle.staged(kept.FIGURES).write_text(json.dumps(figures))
    bundle.commit({"reports": tuple(sorted({*bundle.manifest.reports, kept.FIGURES}))})
    if audit is not None:
        kept.keep_audit(bundle, "onnxruntime", audit)


def good(path: Path) -> Bundle:
    """A handmade bundle with good figures and a good audit."""
    bundle = exported(bundles.make(path))
    keep(bundle, make_report(bundle, *NAMES), audited())
    return bundle


def pictures(count: int = 8) -> NDArray[np.float32]:
    """Coloured discs on gradients, `(count, 3, 32, 32)` in [-1, 1]."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[0:32, 0:32] / 31
    found = []
    for _ in range(count):
        (cx, cy), radius = rng.uniform(0.3, 0.7, 2), rng.uniform(0.15, 0.35)
        inside = np.hypot(x - cx, y - cy) < radius
        ground = np.stack([x, y, 1 - x]) * rng.uniform(0.2, 0.9, (3, 1, 1))
        found.append(np.where(inside, rng.uniform(0, 1, (3, 1, 1)), ground))
    return (np.stack(found) * 2 - 1).astype(np.float32)


def blurred(samples: NDArray[np.float32], width: int = 5) -> NDArray[np.float32]:
    """The mean of each pixel's surroundings."""
    edge = width // 2
    padded = np.pad(samples, ((0, 0), (0, 0), (edge, edge), (edge, edge)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (width, width), axis=(2, 3))
    found: NDArray[np.float32] = windows.mean(axis=(4, 5)).astype(np.float32)
    return found


def with_samples(
    report: dict[str, Any], name: str, made: NDArray[np.float32], wanted: NDArray[np.float32]
) -> dict[str, Any]:
    """A report in which one variant made these samples."""
    for entry in report["variants"]:
        if entry["name"] == name:
            entry |= fidelity.figures(made, wanted) | {"samples": len(made)}
    report["unpaired_psnr_db"] = fidelity.unpaired(wanted)
    return report


def with_distances(report: dict[str, Any], value: float = 0.51234) -> dict[str, Any]:
    """A report with distances of all variants; fd_to_fp of the first after the reference is it."""
    for i, entry in enumerate(report["variants"]):
        for j, key in enumerate(fidelity.DISTANCES):
            middle = value + 0.1 * (i - 1) + 0.01 * j
            entry[key] = {"value": middle, "low": middle - 0.05, "high": middle + 0.06}
    report["variants"][0] |= {"fd_to_fp": None, "kd_to_fp": None}
    report["distances"] = {
        "extractor": "Some Network, 7 features",
        "pictures_per_side": 160,
        "pca_dimensions": 16,
        "interval": "(2.5, 97.5) percentiles of 200 bootstrap replicates",
        "seed": 0,
        "real": "real.npz",
        "real_sha256": "a" * 64,
    }
    return report


class Page(HTMLParser):
    """A parsed page: what it shows outside of scripts and styles, and what it would load."""

    def __init__(self, text: str) -> None:
        """Parse the text of a page."""
        super().__init__()
        self.source = text
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.plots: dict[str, Any] = {}  # id -> what plotly.js is given
        self.tables: list[list[list[str]]] = []  # rows of cells
        self._shown: list[str] = []
        self._cell = False
        self.feed(text)
        self.text = " ".join(" ".join(self._shown).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the tag and the addresses in it."""
        self.tags.append(tag)
        self.loads += [value or "" for key, value in attrs if key in ("src", "href", "srcset")]
        found = dict(attrs)
        if "data-figure" in found:
            self.plots[found["id"] or ""] = json.loads(found["data-figure"] or "")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        self._cell = tag in ("th", "td") or (self._cell and tag not in ("tr", "table"))

    def handle_endtag(self, tag: str) -> None:
        """Close a cell."""
        self._cell = self._cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        """Keep text that is shown."""
        if self.tags and self.cdata_elem is None:
            self._shown.append(data)
        if self._cell:
            cells = self.tables[-1][-1]
            cells[-1] = " ".join([*cells[-1].split(), *data.split()])


def render(bundle: Bundle, report: dict[str, Any]) -> Page:
    """Write a report into the bundle and read its page."""
    path = write_report(bundle, report)
    assert path == bundle.file("reports/report.html")
    assert path.stat().st_size <= MAX_BYTES
    return Page(path.read_text(encoding="utf-8"))
