"""Serve a bundle by a real Triton on 127.0.0.1, and compare its images with the pipeline's.

python tools/triton_check.py BUNDLE --triton VENV/bin/python [--labels 3 5] [--seed 0] [--threads 1]

VENV holds Triton itself and this ditcast, which have to be of the same Python. Triton 2.51 there
has NumPy 1 in its Python backend, in which ditcast still runs:

    python3.11 -m venv VENV
    VENV/bin/pip install nvidia-pytriton==0.7.0 'numpy<2' onnxruntime==1.31.1 \
        click pillow pydantic pyyaml rich safetensors
    VENV/bin/pip install --no-deps -e .

That Triton has the Python backend only; `triton_backend.py` stands in for its onnxruntime backend.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from command import Parser, tool
from numpy.typing import NDArray

from ditcast.bundle import Bundle
from ditcast.errors import ConfigError, UnsupportedError
from ditcast.runtime import Pipeline, triton
from ditcast.sampling import draw_noises, needs_noise
from ditcast.settings import Settings
from ditcast.tables import show

Array = NDArray[Any]
KINDS = {"int64": "INT64", "int32": "INT32", "float32": "FP32"}
HEADER = "Inference-Header-Content-Length"  # where the JSON ends and the arrays begin
NEEDED = ("pytriton", "onnxruntime", "ditcast", "pydantic", "safetensors", "yaml")
PROBE = f"""
import importlib.util, json, sys, sysconfig
found = {{name: importlib.util.find_spec(name) for name in {NEEDED}}}
print(json.dumps({{
    "missing": [name for name, spec in found.items() if spec is None],
    "pytriton": found["pytriton"] and found["pytriton"].submodule_search_locations[0],
    "version": ".".join(map(str, sys.version_info[:2])),
    "libraries": sysconfig.get_config_var("LIBDIR"),
    "binaries": sysconfig.get_path("scripts"),
}}))
"""
START_S = 60


def find_triton(python: Path) -> dict[str, Any]:
    """What the server needs to know of the environment that holds it.

    Raises:
        ConfigError: no such Python, or it lacks a package.
    """
    try:
        command = [str(python), "-I", "-c", PROBE]  # as Triton's Python sees it
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as err:
        raise ConfigError(
            f"triton: {python} is no Python that runs ({err}); name that of an environment with "
            "nvidia-pytriton and onnxruntime, such as --triton VENV/bin/python"
        ) from err
    found: dict[str, Any] = json.loads(done.stdout)
    if found["missing"]:
        raise ConfigError(
            f"triton: {python} lacks {', '.join(found['missing'])}; how to make such an "
            f"environment: {Path(__file__).name}, its first lines"
        )
    return found


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@contextlib.contextmanager
def serving(repository: Path, triton_: dict[str, Any], work: Path) -> Iterator[str]:
    """A server of that repository until the end of the block; yields its address.

    Raises:
        UnsupportedError: it does not get ready.
    """
    home = Path(triton_["pytriton"]) / "tritonserver"
    backends = work / "backends"
    shutil.copytree(home / "backends", backends)
    stub = home / "python_backend_stubs" / triton_["version"] / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    (backends / triton.ONNXRUNTIME).mkdir()
    stand_in = Path(__file__).with_name("triton_backend.py")
    shutil.copy(stand_in, backends / triton.ONNXRUNTIME / "model.py")
    # Its Python is found by PATH, and ignores PYTHONPATH.
    libraries = [str(home.parent.parent / "nvidia_pytriton.libs"), triton_["libraries"]]
    environment = os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PATH": os.pathsep.join([triton_["binaries"], os.environ["PATH"]]),
    }
    port, log = free_port(), work / "server.log"
    options = {
        "model-repository": repository,
        "backend-directory": backends,
        "http-address": "127.0.0.1",
        "http-port": port,
        "allow-grpc": "false",
        "allow-metrics": "false",
    }
    flags = ["--disable-auto-complete-config", *(f"--{k}={v}" for k, v in options.items())]
    command = [str(home / "bin" / "tritonserver"), *flags]
    with log.open("wb") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def wait_until_ready(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Until all models are loaded, or the server has ended."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{address}/v2/health/ready")
            return
        time.sleep(0.2)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    signs = ("failed to load", "error while loading", "nvalid argument", "unrecognized")
    failures = [line for line in lines if any(sign in line for sign in signs)] or lines[-1:]
    raise UnsupportedError(
        f"triton: it does not get ready: {failures[0] if failures else 'no log'}"
    )


def ask(address: str, model: str, feeds: dict[str, Array]) -> Array:
    """The output of one request, as bytes both ways: no digits are lost.

    Raises:
        ConfigError: the server refuses; its own words.
    """
    inputs = [
        {
            "name": name,
            "datatype": KINDS[str(array.dtype)],
            "shape": list(array.shape),
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in feeds.items()
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    body = head + b"".join(array.tobytes() for array in feeds.values())
    request = urllib.request.Request(
        f"{address}/v2/models/{model}/infer", body, {HEADER: str(len(head))}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            split, content = int(answer.headers[HEADER]), answer.read()
    except urllib.error.HTTPError as err:
        raise ConfigError(json.loads(err.read())["error"]) from err
    (output,) = json.loads(content[:split])["outputs"]
    return np.frombuffer(content[split:], np.float32).reshape(output["shape"])


def graph_feeds(pipeline: Pipeline, labels: list[int], seed: int) -> dict[str, Array]:
    """What `sampler.onnx` takes for these images."""
    recipe = pipeline.recipe
    noises = recipe.steps if needs_noise(recipe.sampler) else 0
    shape = pipeline.model.sample_shape
    noise = draw_noises(seed, range(len(labels)), shape, noises)
    feeds = {
        "noise": noise[0],
        "class_labels": np.array(labels),
        "guidance_scale": np.array([recipe.guidance], np.float32),
    }
    return feeds | ({"step_noise": noise[1:]} if noises else {})


def compare(
    address: str, models: tuple[str, ...], pipeline: Pipeline, labels: list[int], seed: int
) -> list[list[str]]:
    """One row per request: the model, the request, the time, and whether all bits are equal."""
    host, graph = models
    numbers, seeds = np.array(labels), np.array([seed])
    whole = {"labels": numbers, "seed": seeds}
    one = {"labels": numbers[-1:], "seed": seeds, "first": np.array([len(labels) - 1])}
    plain = {**whole, "guidance": np.array([1.0], np.float32)}
    reference = pipeline.sample(labels, seed=seed)
    inside = pipeline.sample(labels, seed=seed, loop="graph")
    alone = pipeline.sample(labels[-1:], seed=seed, first=len(labels) - 1)
    unguided = pipeline.sample(labels, seed=seed, guidance=1.0)
    by_python = triton.by_python(pipeline.bundle, pipeline.backend.name)
    rows = []
    for what, model, feeds, wanted in (
        ("all labels", host, whole, reference),
        ("the last label alone", host, one, alone),
        ("guidance 1", host, plain, unguided),
        ("all labels", graph, whole if by_python else graph_feeds(pipeline, labels, seed), inside),
    ):
        started = time.perf_counter()
        found = ask(address, model, feeds)
        seconds = time.perf_counter() - started
        equal = found.shape == wanted.shape and bool((found == wanted).all())
        rows.append([model, what, f"{seconds:.2f}", "equal" if equal else "DIFFERS"])
    try:
        ask(address, host, {"labels": np.array([pipeline.model.num_classes])})
        rows.append([host, "a label that is not", "", "DIFFERS: accepted"])
    except ConfigError as err:
        rows.append([host, "a label that is not", "", f"refused: {err}"])
    return rows


@tool("triton_check")
def main() -> None:
    """Deploy, serve, ask, compare; exit 1 if an image differs."""
    assert __doc__ is not None
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--triton", type=Path, help="Python of the environment that holds Triton")
    parser.add_argument("--labels", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=0, help="of the pipeline it is compared with"
    )
    given = parser.parse_args()
    if given.triton is None:
        raise ConfigError(
            "triton: none given, and this check needs a real one; name the Python of an "
            "environment with nvidia-pytriton and onnxruntime: --triton VENV/bin/python"
        )
    found = find_triton(given.triton.absolute())
    bundle = Bundle.open(given.bundle)
    pipeline = Pipeline(bundle, settings=Settings(threads=given.threads))
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "models"
        models = triton.deploy(bundle, repository)
        with serving(repository, found, Path(folder)) as address:
            rows = compare(address, models, pipeline, given.labels, given.seed)
    show([["model", "request", "s", "bits"], *rows], right=2)
    if any(row[-1].startswith("DIFFERS") for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
