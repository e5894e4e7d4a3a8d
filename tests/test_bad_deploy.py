"""`ditcast deploy` with bad input: one clear line, exit 2, and nothing is written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ditcast.bundle import Bundle
from ditcast.manifest import Quantization
from ditcast.runtime import triton
from tests.conftest import Cli
from tests.test_bad_input import flip, nothing, snapshot, write

TO_TRITON = ("deploy", "b", "--to", "triton")


def recalibrated() -> None:
    """New calibration data; the graphs are of the old."""
    bundle = Bundle.open(Path("b"))
    held = bundle.manifest.quantization
    assert isinstance(held, Quantization)
    content = bundle.file(held.file).read_bytes()
    bundle.staged(held.file).write_bytes(content + b" ")
    bundle.commit({})


CASES: dict[str, tuple[Callable[[], object], tuple[object, ...], str]] = {
    "no bundle": (nothing, ("deploy", "c", "--to", "triton", "m"), "no manifest.json in c; make"),
    "no server": (nothing, ("deploy", "b", "m"), "Missing option '--to'"),
    "an unknown server": (nothing, ("deploy", "b", "--to", "kserve", "m"), "'kserve' is not"),
    "no directory": (nothing, TO_TRITON, "Missing argument 'DIR'"),
    "a directory that holds something": (
        write("full", ""),
        (*TO_TRITON, "."),
        "is not empty; name a new directory, or remove what is there",
    ),
    "a file": (write("f", ""), (*TO_TRITON, "f"), "f is a file; name a new directory"),
    "no folder above": (nothing, (*TO_TRITON, "x/m"), "no folder .*x; create it first"),
    "inside the bundle": (nothing, (*TO_TRITON, "b/m"), "lies in the bundle"),
    "no graphs of the target": (
        nothing,
        (*TO_TRITON, "m", "--backend", "tensorrt"),
        "make it with: ditcast export b --target tensorrt",
    ),
    "stale graphs": (recalibrated, (*TO_TRITON, "m"), "renew it with: ditcast export b"),
    "a damaged file": (
        flip("b/graphs/onnxruntime/weights.data"),
        (*TO_TRITON, "m"),
        "weights.data in b: SHA-256 differs",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(
    name: str, cli: Cli, shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shared_bundle.path, tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    prepare, command, message = CASES[name]
    prepare()
    before = snapshot(tmp_path)
    done = cli(*command)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith("ditcast: error: ")
    assert re.search(message, line), line
    assert snapshot(tmp_path) == before


def test_no_engines(
    cli: Cli, typed_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Says what builds them."""
    monkeypatch.chdir(tmp_path)
    command = ("deploy", typed_bundle.path, "--to", "triton", "m", "--backend", "tensorrt")
    done = cli(*command)
    assert done.code == 2
    assert f"run: ditcast build {typed_bundle.path} --backend tensorrt" in done.err
    assert not (tmp_path / "m").exists()


def test_a_disk_that_is_full(
    cli: Cli, shared_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves nothing behind, and an empty directory as it was."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "weights.data")

    (tmp_path / "m").mkdir()
    monkeypatch.setattr(triton, "readme", fail)
    done = cli("deploy", shared_bundle.path, "--to", "triton", tmp_path / "m")
    assert (done.code, done.err) == (2, "ditcast: error: weights.data: No space left on device\n")
    assert [*tmp_path.iterdir()] == [tmp_path / "m"]
    monkeypatch.undo()
    done = cli("deploy", shared_bundle.path, "--to", "triton", tmp_path / "m")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{tmp_path / 'm'}: models tiny_host and tiny_graph; how to serve")
