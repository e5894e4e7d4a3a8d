"""The bundle directory: one manifest that vouches for every file, and atomic updates of it.

An update is staged under `.staging/` and becomes real in one step, when the new manifest is
written there; from then on every opening of the bundle rolls it forward. Before that step a
killed run leaves the old bundle as it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ditcast.errors import BundleError
from ditcast.manifest import MANIFEST, Manifest, hash_file, read_manifest, render
from ditcast.recipe import Recipe

STAGING = ".staging"
REPORTS = "reports/"


class Bundle:
    """A bundle on disk, opened: its path and its manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Use `open` or `create`."""
        self.path = path
        self.manifest = manifest
        self._lock: int | None = None  # held by a writer, from the first staged file to `commit`

    def __del__(self) -> None:
        """Let go of the lock where an error came before `commit`."""
        self._release()

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Open a bundle: finish an interrupted update, check manifest, paths and sizes.

        Reports are left to those who read them: a bundle without its own can still run, and can
        be measured again.

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
        if (path / STAGING / MANIFEST).is_file():
            lock = _take_lock(path, wait=True)  # another process may be in the middle of this
            try:
                _roll_forward(path)
            finally:
                os.close(lock)
        bundle = cls(path, read_manifest(path / MANIFEST))
        for name, entry in bundle.manifest.files.items():
            if name.startswith(REPORTS):
                continue
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
            BundleError: `path` is a file, holds another bundle, or holds other files; what is there
                is damaged, or another process is writing to it.
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
        self._write()
        target = self.path / STAGING / "new" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def scratch(self, stage: str) -> Path:
        """A folder in which a stage keeps what a resumed run can use."""
        self._write()
        folder = self.path / STAGING / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _write(self) -> None:
        """Become the only writer, until `commit`; forgets what an interrupted run staged.

        Raises:
            BundleError: another process is writing, or has written since this bundle was opened.
        """
        if self._lock is not None:
            return
        self._lock = _take_lock(self.path, wait=False)
        self.clear()
        manifest = self.path / MANIFEST
        if manifest.is_file() and read_manifest(manifest).digest != self.manifest.digest:
            self._release()
            raise BundleError(
                f"bundle: {self.path} was changed by another process; run the command again"
            )

    def clear(self, stage: str = "new") -> None:
        """Forget what an interrupted run staged but never committed, or a stage's scratch."""
        _roll_forward(self.path)  # unless it was committed
        if (self.path / STAGING / stage).exists():
            shutil.rmtree(self.path / STAGING / stage)
        _remove_if_empty(self.path / STAGING)

    def commit(self, update: dict[str, Any], replaces: str | tuple[str, ...] = "") -> None:
        """Make the staged files part of the bundle, together with new manifest sections.

        `replaces` is a path prefix (such as `graphs/`), or several: files under it that were not
        staged again leave the bundle.
        """
        self._write()
        try:
            self._commit(update, replaces)
        finally:
            self._release()

    def _release(self) -> None:
        """Let others write."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _commit(self, update: dict[str, Any], replaces: str | tuple[str, ...]) -> None:
        new = self.path / STAGING / "new"
        staged = sorted(p for p in new.rglob("*") if p.is_file()) if new.is_dir() else []
        files = {
            name: entry
            for name, entry in self.manifest.files.items()
            if not (replaces and name.startswith(replaces))
        }
        for path in staged:
            path.chmod(0o644)  # some libraries write files that no other user can read
            _flush(path)
            files[path.relative_to(new).as_posix()] = hash_file(path)
        update = update | {"files": dict(sorted(files.items()))}
        manifest = self.manifest.model_copy(update=update).sealed()
        journal = self.path / STAGING / MANIFEST
        journal.parent.mkdir(parents=True, exist_ok=True)
        partial = journal.with_suffix(".tmp")
        partial.write_text(render(manifest.model_dump(mode="json")))
        _flush(partial)
        read_manifest(partial)  # never promise what could not be opened again
        partial.replace(journal)
        self.manifest = manifest
        _roll_forward(self.path)

    def check(self, name: str, remedy: str = "the bundle is damaged, compile it again") -> None:
        """Hash one file.

        Raises:
            BundleError: it is missing or its hash differs; the message ends with the remedy.
        """
        path = self.file(name)
        if not path.is_file():
            raise BundleError(f"bundle: no file {name} in {self.path}, expected one; {remedy}")
        if hash_file(path) != self.manifest.files[name]:
            raise BundleError(
                f"bundle: {name} in {self.path}: SHA-256 differs from the manifest; {remedy}"
            )

    def check_content(self, targets: Iterable[str]) -> None:
        """Hash the files that a measurement of these targets stands on; see `content`.

        Raises:
            BundleError: the first one that is missing or differs.
        """
        for name in [*self._sections(), *self._graph_files(targets)]:
            self.check(name)

    def verify(self) -> int:
        """Hash every file; returns how many there are.

        Raises:
            BundleError: the first file whose hash differs, or that the manifest does not list.
        """
        for name in self.manifest.files:
            self.check(name)
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
            f"bundle: {self.path} has no graph {name!r} for target {target!r}; it has targets "
            f"{', '.join(held)}; make it with: ditcast export {self.path} --target {target}"
        )

    def graphs_made_from(self) -> str:
        """Hash of all that the exported graphs depend on."""
        parts = [self.manifest.fingerprint()]
        parts += [self.manifest.files[name].sha256 for name in self._sections()]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    def _sections(self) -> list[str]:
        """The files of what calibration and the cache's fit have found."""
        sections = (self.manifest.quantization, self.manifest.cache)
        return [section.file for section in sections if section is not None]

    def _graph_files(self, targets: Iterable[str]) -> list[str]:
        """The files of the graphs of these targets."""
        folders = tuple(f"graphs/{target}/" for target in targets)
        return [name for name in self.manifest.files if name.startswith(folders)]

    def check_writable(self) -> None:
        """Refuse a folder that no report can be put into, before the long work.

        Raises:
            BundleError: this user may not write there.
        """
        if not os.access(self.path, os.W_OK):
            raise BundleError(
                f"bundle: {self.path} cannot be written, so what is measured would be lost; "
                "change its permissions, or work on a copy"
            )

    def content(self, targets: Iterable[str]) -> str:
        """Hash of all that a measurement of these targets stands on; reports are no part of it."""
        files = self.manifest.files
        parts = [f"{name} {files[name].sha256}" for name in self._graph_files(targets)]
        parts = [self.graphs_made_from(), *sorted(parts)]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _take_lock(path: Path, wait: bool) -> int:
    """Lock the bundle's folder against other writers; the lock ends with the file descriptor."""
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as err:
        os.close(lock)
        raise BundleError(
            f"bundle: {path} is being written by another process; wait for it and run again"
        ) from err
    return lock


def _flush(path: Path) -> None:
    """Have the operating system write a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _roll_forward(path: Path) -> None:
    """Finish a committed update: move its files in place, then the manifest, then tidy up."""
    journal = path / STAGING / MANIFEST
    if not journal.is_file():
        return
    manifest = read_manifest(journal)
    new = path / STAGING / "new"
    for staged in sorted(p for p in new.rglob("*") if p.is_file()):
        target = path / staged.relative_to(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.replace(target)
    previous = path / MANIFEST
    held = set(read_manifest(previous).files) if previous.is_file() else set()
    for name in held - set(manifest.files):
        (path / name).unlink(missing_ok=True)
    journal.replace(previous)
    shutil.rmtree(new, ignore_errors=True)
    _remove_if_empty(path / STAGING)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


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
