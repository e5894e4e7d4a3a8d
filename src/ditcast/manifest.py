"""The manifest of a bundle: its sections, its one text, and the checks on reading it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ditcast.errors import BundleError
from ditcast.recipe import Recipe

FORMAT_VERSION = 8
MANIFEST = "manifest.json"
REFERENCE = "reference"  # the target of full precision
WEIGHTS = "weights.data"  # in the folder of a target: the weights of all its graphs
_CHUNK = 1 << 22


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Section):
    """Size and SHA-256 of one file."""

    size: int
    sha256: str


class ModelInfo(_Section):
    """The denoiser that the bundle was made of; shapes are without the batch."""

    source: str
    architecture: str
    fingerprint: str
    sample_shape: tuple[int, int, int]
    output_channels: int
    classes: tuple[str, ...]
    num_classes: int
    null_label: int | None
    slots: tuple[str, ...]
    slot_shape: tuple[int, ...]
    features: int
    parameters: int
    temporal_parameters: int


class Layer(_Section):
    """One quantized layer: its name, its block, its precision, and its weight's shape (O, I).

    `positions` is the number of rows of its product that one sample makes.
    """

    name: str
    block: str
    precision: str
    shape: tuple[int, int]
    positions: int


class Quantization(_Section):
    """What calibration found; the scales themselves lie in `file`.

    `stored` are the labels whose temporal features are stored in place of the TIB; None where
    any label can be asked for.
    """

    made_from: str
    file: str
    layers: tuple[Layer, ...]
    labels: tuple[int, ...]
    stored: tuple[int, ...] | None = None


class CacheFit(_Section):
    """What calibration fitted to the cache's plan; the tables themselves lie in `file`.

    `held_back` of `forecasts` (step, slot) are plain reuse by the noise guard; `corrected` says
    whether samples are corrected after each step. `places` are the full steps, if they were fitted.
    """

    made_from: str
    file: str
    held_back: int = 0
    forecasts: int = 0
    corrected: bool = False
    threshold: float | None = None
    full_steps: float | None = None
    reused: float | None = None
    places: tuple[int, ...] | None = None


class Graph(_Section):
    """One exported graph and the largest difference to torch that export measured.

    `layers` are the quantized layers that it holds.
    """

    target: str
    name: str
    path: str
    made_from: str
    parity: dict[str, float]
    layers: tuple[str, ...] = ()


class Engine(_Section):
    """One plan of a graph: what it was built of and for, and who vouches for it.

    `key` is the hash of `made_from` (graph and weights), backend, version, device and flags;
    `profile` holds min, opt and max of every dynamic axis of every input. `layers` is the file of
    what the builder said that it made of the graph. `signature` is by the builder's own key.
    """

    graph: str
    backend: str
    version: str
    device: str
    flags: tuple[str, ...]
    profile: dict[str, dict[str, tuple[int, int, int]]]
    made_from: str
    key: str
    path: str
    layers: str
    weights_bytes: int
    build_s: float
    signature: str = ""


class Manifest(_Section):
    """Everything a reader has to know; unknown keys are errors."""

    format_version: int
    producer: dict[str, str]
    recipe: Recipe
    model: ModelInfo
    schedule: dict[str, Any]
    quantization: Quantization | None = None
    cache: CacheFit | None = None
    graphs: tuple[Graph, ...] = ()
    engines: tuple[Engine, ...] = ()
    golden: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()
    files: dict[str, FileEntry] = {}
    digest: str = ""

    def stored_labels(self) -> tuple[int, ...] | None:
        """The labels, without null, whose features are stored; None where there is the TIB."""
        if self.quantization is None or self.quantization.stored is None:
            return None
        stored = self.quantization.stored
        return stored if self.model.null_label is None else stored[:-1]

    def fingerprint(self) -> str:
        """Hash of what the bundle is made from: model, class names, schedule and recipe."""
        recipe = self.recipe.model_dump(mode="json")
        parts = (recipe, self.model.fingerprint, self.model.classes, self.schedule)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def sealed(self) -> Manifest:
        """The same manifest with the digest over all its other keys."""
        return self.model_copy(update={"digest": _digest(self.model_dump(mode="json"))})


def _digest(values: dict[str, Any]) -> str:
    rest = {key: value for key, value in values.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return FileEntry(size=path.stat().st_size, sha256=digest.hexdigest())


def read_manifest(path: Path) -> Manifest:
    """Parse and check a manifest by its digest, its version and the paths it names."""
    try:
        text = path.read_text()
        values = json.loads(text)
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise BundleError(
                f"bundle: {path}: got format_version {version!r}, expected {FORMAT_VERSION}; "
                "this bundle needs another version of ditcast"
            )
        for name in values.get("files", {}):
            _check_contained(name, path)
        manifest = Manifest.model_validate(values)
        for name in _referenced(manifest):
            if name not in manifest.files:
                raise ValueError(f"{name!r} is not among its files")
    except (ValueError, AttributeError, TypeError, ValidationError) as err:
        problem = err.errors()[0]["msg"] if isinstance(err, ValidationError) else str(err)
        raise BundleError(
            f"bundle: {path} is damaged ({problem.splitlines()[0]}); compile the bundle again"
        ) from err
    # The text itself is compared too, so that not even white space can change unseen.
    if _digest(values) != manifest.digest or text != render(values):
        raise BundleError(
            f"bundle: {path} is damaged (its digest differs); compile the bundle again"
        )
    return manifest


def render(values: dict[str, Any]) -> str:
    """The one text of a manifest."""
    return json.dumps(values, indent=1) + "\n"


def _referenced(manifest: Manifest) -> list[str]:
    """Every file that a section of the manifest names."""
    names = [graph.path for graph in manifest.graphs]
    names += [name for engine in manifest.engines for name in (engine.path, engine.layers)]
    if manifest.quantization is not None:
        names.append(manifest.quantization.file)
    if manifest.cache is not None:
        names.append(manifest.cache.file)
    return [*names, *manifest.golden, *manifest.reports]


def _check_contained(name: str, manifest: Path) -> None:
    """Refuse a file name that is absolute or climbs out of the bundle."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise BundleError(
            f"bundle: {manifest} names {name!r}, which leads out of the bundle; do not trust it"
        )
