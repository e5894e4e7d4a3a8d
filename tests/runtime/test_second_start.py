"""ONNX Runtime's second start: what it optimized is kept, and gives the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from ditcast.bundle import Bundle
from ditcast.errors import BundleError
from ditcast.runtime import Pipeline
from ditcast.runtime.backends import GraphFile, graph_file, make_backend
from ditcast.runtime.backends.base import failure
from ditcast.runtime.backends.onnxruntime import OnnxRuntimeBackend
from ditcast.settings import Settings

LABELS = [1, 2]
SPINNING = "session.intra_op.allow_spinning"


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that no other test fills."""
    monkeypatch.setenv("DITCAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("loop", ["host", "graph"])
def test_the_second_start_gives_the_same_bits(
    shared_bundle: Bundle, own_folder: Path, loop: Literal["host", "graph"]
) -> None:
    first = Pipeline(shared_bundle).sample(LABELS, loop=loop)
    kept = {path: path.stat().st_mtime_ns for path in own_folder.rglob("graph.onnx")}
    assert len(kept) == 1
    assert np.array_equal(Pipeline(shared_bundle).sample(LABELS, loop=loop), first)
    assert {path: path.stat().st_mtime_ns for path in own_folder.rglob("graph.onnx")} == kept


def test_float_graphs_are_not_copied(shared_bundle: Bundle, own_folder: Path) -> None:
    Pipeline(shared_bundle, target="reference").sample(LABELS)
    assert list(own_folder.rglob("*.onnx")) == []


def test_a_graph_that_cannot_be_read_is_compiled_again(
    shared_bundle: Bundle, own_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Pipeline(shared_bundle).sample(LABELS)
    (kept,) = own_folder.rglob("graph.onnx")
    kept.write_bytes(b"x" * kept.stat().st_size)
    assert np.array_equal(Pipeline(shared_bundle).sample(LABELS), first)
    assert "cannot be read" in capsys.readouterr().err
    assert kept.read_bytes()[:1] != b"x"


def test_threads_that_do_not_spin_compute_the_same(shared_bundle: Bundle) -> None:
    wanted = Pipeline(shared_bundle).sample(LABELS)
    settings = Settings(spin=False)
    pipeline = Pipeline(shared_bundle, settings=settings)
    assert np.array_equal(pipeline.sample(LABELS), wanted)
    assert pipeline.backend.facts()["spin"] is False
    assert isinstance(pipeline.backend, OnnxRuntimeBackend)
    entry = pipeline.backend._options().get_session_config_entry(SPINNING)
    assert entry == "0"


@pytest.mark.parametrize(
    "err",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[E] Failed to allocate memory for requested buffer of size 123"),
    ],
)
def test_out_of_memory_says_what_was_needed(err: Exception) -> None:
    graph = GraphFile(path=Path("full.onnx"), size=3 << 20)
    found = str(failure("onnxruntime", graph, "loading", err))
    assert found.startswith(
        "backend onnxruntime: out of memory, loading full.onnx: its files are 3 MiB, and "
    )
    assert "MiB are available; use --low-memory, a smaller batch, or a quantized target" in found


LIMITED = """
import resource, sys
from pathlib import Path
from ditcast.bundle import Bundle
from ditcast.errors import BundleError
from ditcast.runtime import Pipeline
pipeline = Pipeline(Bundle.open(Path(sys.argv[1])))
pipeline.sample([0])
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
try:
    pipeline.session("full").run(
        {
            "sample": np.zeros((2000, *pipeline.model.sample_shape), np.float32),
            "features": np.zeros((2000, pipeline.model.features), np.float32),
            "ahead": np.zeros((0, 2000, pipeline.model.features), np.float32),
            "weights": np.zeros((0, len(pipeline.model.slots)), np.float32),
        },
        ["output"],
    )
except BundleError as err:
    print(err)
"""


def test_a_batch_that_does_not_fit_into_memory(shared_bundle: Bundle) -> None:
    """A real failure of the runtime, in a process whose address space is limited."""
    code = "import numpy as np\n" + LIMITED
    command = [sys.executable, "-c", code, str(shared_bundle.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "out of memory, running" in done.stdout


def test_a_session_names_its_graph(shared_bundle: Bundle) -> None:
    session = make_backend("onnxruntime").session(graph_file(shared_bundle, "onnxruntime", "full"))
    with pytest.raises(BundleError, match=r"running .*full\.onnx fails"):
        session.run({}, ["output"])
