"""The bundle directory: one manifest that vouches for every file, and atomic updates of it.

An update is staged under `.staging/` and becomes real in one step, when the new manifest is
written there; from then on every opening of the bundle rolls it forward. Before that step a
killed run leaves the old bundle as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ditcast.errors import BundleError
from ditcast.recipe import Recipe

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STAGING = ".staging"
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
    slots: tuple[str, ...]
    features: int
    parameters: int
    temporal_parameters: int


class Layer(_Section):
    """One quantized Linear: its name, its block, and the precision it must run in."""

    name: str
    block: str
    precision: str


class Quantization(_Section):
    """What calibration found; the scales themselves lie in `file`."""

    made_from: str
    file: str
    layers: tuple[Layer, ...]
    labels: tuple[int, ...]
    calibration_s: float


class Graph(_Section):
    """One exported graph and the largest difference to torch that export measured."""

    target: str
    name: str
    path: str
    made_from: str
    parity: dict[str, float]


class Manifest(_Section):
    """Everything a reader has to know; unknown keys are errors."""

    format_version: int
    producer: dict[str, str]
    recipe: Recipe
    model: ModelInfo
    schedule: dict[str, Any]
    quantization: Quantization | None = None
    graphs: tuple[Graph, ...] = ()
    golden: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()
    files: dict[str, FileEntry] = {}
    digest: str = ""

    def fingerprint(self) -> str:
        """Hash of what the bundle is made from: model, schedule and recipe."""
        parts = (self.recipe.model_dump(mode="json"), self.model.fingerprint, self.schedule)
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


class Bundle:
    """A bundle on disk, opened: its path and its manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Use `open` or `create`."""
        self.path = path
        self.manifest = manifest
        self._staging = False  # whether what lies staged is of this object

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Open a bundle: finish an interrupted update, check manifest, paths and sizes.

        Raises:
            BundleError: no bundle, a damaged or newer manifest, a path that leaves the bundle,
                a link, a missing file or one of another size.
        """
        if not (path / MANIFEST).is_file() and not (path / STAGING / MANIFEST).is_file():
            raise BundleError(
                f"bundle: no {MANIFEST} in {path}; "
                f"make a bundle with: ditcast compile MODEL -o {path}"
            )
        for found in path.rglob("*"):
            if found.is_symlink():
                raise BundleError(
                    f"bundle: {found} is a link, which can lead out of the bundle; "
                    "put what it points to in its place"
                )
        _roll_forward(path)
        bundle = cls(path, _read_manifest(path / MANIFEST))
        for name, entry in bundle.manifest.files.items():
            found = bundle.file(name)
            size = found.stat().st_size if found.is_file() else None
            if size != entry.size:
                got = "no regular file" if size is None else f"{size} bytes"
                raise BundleError(
                    f"bundle: {name} in {path}: got {got}, expected {entry.size} bytes; "
                    "the bundle is damaged, compile it again"
                )
        return bundle

    @classmethod
    def create(cls, path: Path, manifest: Manifest) -> Bundle:
        """Open the bundle at `path` if it is of the same model and recipe, else start one there.

        Raises:
            BundleError: `path` is a file, holds another bundle, or holds other files.
        """
        if path.exists() and not path.is_dir():
            raise BundleError(f"bundle: {path} is a file; give a directory to -o")
        if (path / MANIFEST).is_file() or (path / STAGING / MANIFEST).is_file():
            bundle = cls.open(path)
            if bundle.manifest.fingerprint() != manifest.fingerprint():
                raise BundleError(_other_bundle(path, bundle.manifest, manifest))
            return bundle
        if path.exists() and any(entry.name != STAGING for entry in path.iterdir()):
            raise BundleError(f"bundle: {path} holds other files; give an empty directory to -o")
        path.mkdir(parents=True, exist_ok=True)
        bundle = cls(path, manifest)
        bundle.commit({})
        return bundle

    def file(self, name: str) -> Path:
        """The path of a file of the bundle; `name` never leads out of it."""
        return self.path / name

    def staged(self, name: str) -> Path:
        """Where to write the new version of file `name` before `commit`."""
        if not self._staging:
            self.clear()
            self._staging = True
        target = self.path / STAGING / "new" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def scratch(self, stage: str) -> Path:
        """A folder in which a stage keeps what a resumed run can use."""
        folder = self.path / STAGING / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def clear(self, stage: str = "new") -> None:
        """Forget what an interrupted run staged but never committed, or a stage's scratch."""
        _roll_forward(self.path)  # unless it was committed
        shutil.rmtree(self.path / STAGING / stage, ignore_errors=True)
        _remove_if_empty(self.path / STAGING)

    def commit(self, update: dict[str, Any], replaces: str = "") -> None:
        """Make the staged files part of the bundle, together with new manifest sections.

        `replaces` is a path prefix (such as `graphs/`): files under it that were not staged
        again leave the bundle.
        """
        if not self._staging:
            self.clear()
        self._staging = False
        new = self.path / STAGING / "new"
        staged = sorted(p for p in new.rglob("*") if p.is_file()) if new.is_dir() else []
        files = {
            name: entry
            for name, entry in self.manifest.files.items()
            if not (replaces and name.startswith(replaces))
        }
        for path in staged:
            files[path.relative_to(new).as_posix()] = hash_file(path)
        update = update | {"files": dict(sorted(files.items()))}
        self.manifest = self.manifest.model_copy(update=update).sealed()
        journal = self.path / STAGING / MANIFEST
        journal.parent.mkdir(parents=True, exist_ok=True)
        text = _render(self.manifest)
        partial = journal.with_suffix(".tmp")
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(journal)
        _roll_forward(self.path)

    def verify(self) -> int:
        """Hash every file; returns how many there are.

        Raises:
            BundleError: the first file whose hash differs, or that the manifest does not list.
        """
        for name, entry in self.manifest.files.items():
            if hash_file(self.file(name)) != entry:
                raise BundleError(
                    f"bundle: {name} in {self.path}: SHA-256 differs from the manifest; "
                    "the bundle is damaged, compile it again"
                )
        listed = {*self.manifest.files, MANIFEST}
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if not path.is_dir() and name not in listed and not name.startswith(f"{STAGING}/"):
                raise BundleError(
                    f"bundle: {name} in {self.path} is not in the manifest; remove it"
                )
        return len(self.manifest.files)

    def graph(self, target: str, name: str) -> Path:
        """The file of one exported graph.

        Raises:
            BundleError: the bundle has no such graph, or it is older than its sections.
        """
        if not self.manifest.graphs:
            raise BundleError(
                f"bundle: {self.path} has no graphs yet; make them with: ditcast export {self.path}"
            )
        for graph in self.manifest.graphs:
            if (graph.target, graph.name) == (target, name):
                if graph.made_from != self.graphs_made_from():
                    raise BundleError(
                        f"bundle: {graph.path} was made from other calibration data; "
                        f"renew it with: ditcast export {self.path}"
                    )
                return self.file(graph.path)
        held = sorted({graph.target for graph in self.manifest.graphs})
        raise BundleError(
            f"bundle: {self.path} has no graph {name!r} for target {target!r}; "
            f"it has targets {', '.join(held)}"
        )

    def graphs_made_from(self) -> str:
        """Hash of all that the exported graphs depend on."""
        parts = [self.manifest.fingerprint()]
        if self.manifest.quantization is not None:
            parts.append(self.manifest.files[self.manifest.quantization.file].sha256)
        return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _roll_forward(path: Path) -> None:
    """Finish a committed update: move its files in place, then the manifest, then tidy up."""
    journal = path / STAGING / MANIFEST
    if not journal.is_file():
        return
    manifest = _read_manifest(journal)
    new = path / STAGING / "new"
    for staged in sorted(p for p in new.rglob("*") if p.is_file()):
        target = path / staged.relative_to(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.replace(target)
    previous = path / MANIFEST
    held = set(_read_manifest(previous).files) if previous.is_file() else set()
    for name in held - set(manifest.files):
        (path / name).unlink(missing_ok=True)
    journal.replace(previous)
    shutil.rmtree(new, ignore_errors=True)
    _remove_if_empty(path / STAGING)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _read_manifest(path: Path) -> Manifest:
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
    if _digest(values) != manifest.digest or text != _render(manifest):
        raise BundleError(
            f"bundle: {path} is damaged (its digest differs); compile the bundle again"
        )
    return manifest


def _render(manifest: Manifest) -> str:
    """The one text of a manifest."""
    return json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n"


def _referenced(manifest: Manifest) -> list[str]:
    """Every file that a section of the manifest names."""
    names = [graph.path for graph in manifest.graphs]
    if manifest.quantization is not None:
        names.append(manifest.quantization.file)
    return [*names, *manifest.golden, *manifest.reports]


def _check_contained(name: str, manifest: Path) -> None:
    """Refuse a file name that is absolute or climbs out of the bundle."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise BundleError(
            f"bundle: {manifest} names {name!r}, which leads out of the bundle; do not trust it"
        )


def _other_bundle(path: Path, held: Manifest, wanted: Manifest) -> str:
    """Say in what the bundle that is there differs from the one asked for."""
    differences = [
        f"{key} {getattr(held.recipe, key)!r} (asked for {getattr(wanted.recipe, key)!r})"
        for key in Recipe.model_fields
        if getattr(held.recipe, key) != getattr(wanted.recipe, key)
    ]
    if held.model.fingerprint != wanted.model.fingerprint:
        differences.insert(0, f"model {held.model.source} (asked for {wanted.model.source})")
    what = ", ".join(differences) or "another noise schedule"
    return f"bundle: {path} holds another bundle: {what}; give another -o or remove it"
