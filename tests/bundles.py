"""A bundle made by hand in milliseconds, and what one who means harm would put into it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.manifest import FORMAT_VERSION, Graph, Manifest, ModelInfo, Quantization

SCALES = "calibration/scales.safetensors"
FILES = {
    SCALES: b"scales" * 20,
    "graphs/reference/full.onnx": b"graph" * 30,
    "graphs/reference/weights.data": bytes(range(256)) * 3,
}


def manifest(fingerprint: str = "f" * 64, **recipe: Any) -> Manifest:
    """The manifest of an empty bundle."""
    info = ModelInfo(
        source="somewhere",
        architecture="DiTTransformer2DModel",
        fingerprint=fingerprint,
        sample_shape=(3, 16, 16),
        output_channels=3,
        classes=("cat", "dog"),
        num_classes=2,
        null_label=2,
        slots=("blocks.0.attn", "blocks.0.mlp"),
        slot_shape=(16, 4),
        features=8,
        parameters=9,
        temporal_parameters=3,
    )
    return Manifest(
        format_version=FORMAT_VERSION,
        producer={"ditcast": "0"},
        recipe=recipes.make(recipe),
        model=info,
        schedule={"_class_name": "DDIMScheduler"},
    )


def stage(bundle: Bundle, files: dict[str, bytes]) -> None:
    """Write files of the next commit."""
    for name, content in files.items():
        bundle.staged(name).write_bytes(content)


def make(path: Path) -> Bundle:
    """A bundle with scales and one graph."""
    bundle = Bundle.create(path, manifest())
    stage(bundle, {SCALES: FILES[SCALES]})
    calibrated = Quantization(
        made_from=bundle.manifest.fingerprint(),
        file=SCALES,
        layers=(),
        labels=(0,),
    )
    bundle.commit({"quantization": calibrated})
    stage(bundle, {name: data for name, data in FILES.items() if name != SCALES})
    graph = Graph(
        target="reference",
        name="full",
        path="graphs/reference/full.onnx",
        made_from=bundle.graphs_made_from(),
        parity={"psnr_db": 100.0},
    )
    bundle.commit({"graphs": (graph,)}, replaces="graphs/")
    return bundle


def write_manifest(path: Path, changed: Manifest) -> None:
    """Put a manifest into a bundle that is sealed, as one who means harm can do too."""
    text = json.dumps(changed.sealed().model_dump(mode="json"), indent=1) + "\n"
    (path / "manifest.json").write_text(text)


class Bomb:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path | str) -> None:
        """Say which folder."""
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        """Run code when unpickled."""
        return os.mkdir, (str(self.path),)
