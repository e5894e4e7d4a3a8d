"""A bundle vouches for every byte it holds, and leads nowhere outside itself."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ditcast.bundle import Bundle
from ditcast.errors import BundleError
from ditcast.manifest import MANIFEST, FileEntry
from tests import bundles
from tests.bundles import FILES, SCALES, Bomb


@pytest.fixture
def small(tmp_path: Path) -> Bundle:
    """A bundle made by hand."""
    return bundles.make(tmp_path / "small.bundle")


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle made by hand, for tests that put every byte back."""
    return bundles.make(tmp_path_factory.mktemp("bundle") / "victim.bundle").path


def check(path: Path) -> int:
    """What `ditcast verify` does."""
    return Bundle.open(path).verify()


def test_a_bundle_says_what_it_holds(small: Bundle) -> None:
    """Opened again it is the same, with size and SHA-256 of every file."""
    found = Bundle.open(small.path)
    assert found.manifest == small.manifest
    assert found.verify() == len(FILES)
    for name, content in FILES.items():
        entry = found.manifest.files[name]
        assert (entry.size, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert found.file(name).read_bytes() == content
    assert found.graph("reference", "full") == small.path / "graphs/reference/full.onnx"


def flip(path: Path, offset: int, bit: int) -> Callable[[], object]:
    """Flip a bit of a file; returns a function that puts it back."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[offset] ^= 1 << bit
    path.write_bytes(changed)
    return lambda: path.write_bytes(content)


@given(
    name=st.sampled_from([*FILES, MANIFEST]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
@settings(deadline=None, max_examples=150)
def test_any_flipped_bit_is_found(victim: Path, name: str, place: float, bit: int) -> None:
    """In any file, the manifest included, at any place."""
    path = victim / name
    restore = flip(path, int(place * path.stat().st_size), bit)
    try:
        with pytest.raises(BundleError, match=r"SHA-256 differs|damaged|expected \d; this bundle"):
            check(victim)
    finally:
        restore()
    check(victim)


def test_opening_finds_a_flip_anywhere_in_the_manifest(victim: Path) -> None:
    """White space and digest included, without reading any other file."""
    for offset in range(0, (victim / MANIFEST).stat().st_size, 5):
        restore = flip(victim / MANIFEST, offset, offset % 8)
        with pytest.raises(BundleError):
            Bundle.open(victim)
        restore()


@pytest.mark.parametrize(("old", "new"), [("\n ", "\n\t"), ("}\n", "}"), ('"digest"', '"digest" ')])
def test_even_white_space_counts(small: Bundle, old: str, new: str) -> None:
    """A manifest that says the same in other bytes is not the one that was written."""
    text = (small.path / MANIFEST).read_text()
    assert old in text
    (small.path / MANIFEST).write_text(text.replace(old, new))
    with pytest.raises(BundleError, match=r"is damaged \(its digest differs\)"):
        Bundle.open(small.path)


def test_a_flipped_byte_of_a_compiled_bundle_is_found(bundle: Bundle) -> None:
    """Every file of a real one: graphs, weights, scales, golden values."""
    names = list(bundle.manifest.files)
    assert len(names) == 12  # 2 targets of 4 graphs and weights; scales and golden step
    for name in names:
        restore = flip(bundle.file(name), bundle.file(name).stat().st_size // 2, 0)
        with pytest.raises(BundleError, match=f"{name} in .*: SHA-256 differs from the manifest"):
            check(bundle.path)
        restore()
    assert check(bundle.path) == len(names)


def truncate(path: Path) -> None:
    """Lose the last byte of the weights."""
    weights = path / "graphs/reference/weights.data"
    weights.write_bytes(weights.read_bytes()[:-1])


def remove(path: Path) -> None:
    """Lose the scales."""
    (path / SCALES).unlink()


def add_file(path: Path) -> None:
    """Put in a file that nobody listed."""
    (path / "graphs" / "reference" / "extra.onnx").write_bytes(b"?")


def link_file(path: Path) -> None:
    """Replace a file by a link to an equal one elsewhere."""
    shutil.move(path / SCALES, path.parent / "elsewhere")
    (path / SCALES).symlink_to(path.parent / "elsewhere")


def link_folder(path: Path) -> None:
    """Replace a folder by a link to an equal one elsewhere."""
    shutil.move(path / "graphs", path.parent / "elsewhere")
    (path / "graphs").symlink_to(path.parent / "elsewhere")


def link_staging(path: Path) -> None:
    """Let an update that looks committed take files from elsewhere."""
    (path.parent / "elsewhere" / "new").mkdir(parents=True)
    (path.parent / "elsewhere" / "new" / "precious").write_text("mine")
    shutil.copy(path / MANIFEST, path.parent / "elsewhere")
    (path / ".staging").symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (truncate, "weights.data in .*: got 767 bytes, expected 768 bytes"),
        (remove, "scales.safetensors in .*: got no regular file, expected 120 bytes"),
        (add_file, "extra.onnx in .* is not in the manifest; remove it"),
        (link_file, "scales.safetensors is a link, which can lead out of the bundle"),
        (link_folder, "graphs is a link, which can lead out of the bundle"),
        (link_staging, ".staging is a link, which can lead out of the bundle"),
    ],
)
def test_files_are_those_of_the_manifest(
    small: Bundle, damage: Callable[[Path], None], match: str
) -> None:
    """None shorter, missing, added, or somewhere else."""
    damage(small.path)
    elsewhere = small.path.parent / "elsewhere"
    before = sorted(elsewhere.rglob("*"))
    with pytest.raises(BundleError, match=match):
        check(small.path)
    assert sorted(elsewhere.rglob("*")) == before


def test_opening_finds_another_size(small: Bundle) -> None:
    """`sample` only opens a bundle, which checks sizes without reading gigabytes."""
    truncate(small.path)
    with pytest.raises(BundleError):
        Bundle.open(small.path)


@pytest.mark.parametrize(
    "name", ["../outside", "graphs/../../outside", "/etc/hostname", "..\\outside", "", "."]
)
def test_names_that_lead_outside_are_refused(small: Bundle, name: str) -> None:
    """Even under a digest that is right: whoever made it is not to be trusted."""
    (small.path.parent / "outside").write_bytes(b"1")
    files = small.manifest.files | {name: FileEntry(size=1, sha256="0" * 64)}
    bundles.write_manifest(small.path, small.manifest.model_copy(update={"files": files}))
    with pytest.raises(BundleError, match="leads out of the bundle; do not trust it"):
        Bundle.open(small.path)


def rewrite(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as JSON and give it the right digest."""
    values = json.loads((path / MANIFEST).read_text())
    edit(values)
    rest = {key: value for key, value in values.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True)
    values["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(values, indent=1) + "\n")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda m: m.update(engine="?"), "is damaged .Extra inputs are not permitted"),
        (lambda m: m["recipe"].update(speed=11), "is damaged .Extra inputs are not permitted"),
        (
            lambda m: m.update(format_version=9),
            "got format_version 9, expected 8; this bundle needs",
        ),
        (
            lambda m: m.update(format_version=4),  # which says nothing of a null label
            "got format_version 4, expected 8; this bundle needs",
        ),
        (lambda m: m.pop("format_version"), "got format_version None, expected 8"),
        (lambda m: m["model"].pop("slot_shape"), "is damaged .Field required"),
        (lambda m: m.pop("model"), "is damaged .Field required"),
        (lambda m: m.update(files=[1]), "is damaged"),
        (lambda m: m["files"].pop(SCALES), f"'{SCALES}' is not among its files"),
        (lambda m: m.update(golden=["../x"]), "'../x' is not among its files"),
        (lambda m: m.update(reports=["/etc/passwd"]), "'/etc/passwd' is not among its files"),
        (lambda m: m["graphs"][0].update(path="x"), "'x' is not among its files"),
    ],
)
def test_a_manifest_holds_what_this_version_knows(
    small: Bundle, edit: Callable[[dict[str, Any]], object], match: str
) -> None:
    """Unknown keys, another format, sections that name files which are not there."""
    rewrite(small.path, edit)
    with pytest.raises(BundleError, match=match):
        Bundle.open(small.path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"format_version"', "\x00", "{}"])
def test_what_is_no_manifest_is_an_error_of_ours(small: Bundle, text: str) -> None:
    """Whatever the file holds instead of a JSON object."""
    (small.path / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match="manifest.json"):
        Bundle.open(small.path)


def test_a_pickle_is_never_executed(small: Bundle, tmp_path: Path) -> None:
    """One that was smuggled in is reported; one in the place of the scales is only hashed."""
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    (small.path / "calibration" / "more.pkl").write_bytes(bomb)
    with pytest.raises(BundleError, match="more.pkl in .* is not in the manifest"):
        check(small.path)
    (small.path / "calibration" / "more.pkl").unlink()
    size = len(FILES[SCALES])
    (small.path / SCALES).write_bytes(bomb[:size].ljust(size, b"\0"))
    with pytest.raises(BundleError, match="SHA-256 differs"):
        check(small.path)
    assert not (tmp_path / "exploded").exists()


def test_stale_graphs_name_the_command_that_renews_them(small: Bundle) -> None:
    """New scales without a new export: the old graphs do not run."""
    bundles.stage(small, {SCALES: b"other scales"})
    small.commit({})
    with pytest.raises(BundleError, match="other calibration data; renew it with: ditcast export"):
        Bundle.open(small.path).graph("reference", "full")


def test_missing_graphs_say_what_there_is(small: Bundle, tmp_path: Path) -> None:
    """Another target, another name, or none at all yet."""
    with pytest.raises(BundleError, match="no graph 'full' for target 'openvino'; .* reference"):
        small.graph("openvino", "full")
    with pytest.raises(BundleError, match="no graph 'reuse' for target 'reference'"):
        small.graph("reference", "reuse")
    empty = Bundle.create(tmp_path / "empty", bundles.manifest())
    with pytest.raises(BundleError, match="has no graphs yet; make them with: ditcast export"):
        empty.graph("reference", "full")
