"""The ways there are to run a diffusers DiT on a CPU: what `tools/bench_cpu.py` measures.

A rival is one line of `RIVALS`: its title, the artifact it is loaded from, and what loads it. An
artifact (weights, exported graph, quantized graph) is one line of `ARTIFACTS`; it is made once, in
a process of its own, and kept as `WORK/MODEL/ARTIFACT/` with what its maker said in a `.log`.

This file is also the program of those processes and of the fresh ones in which peak memory and
load time are measured, so nothing heavy is imported at the top: each pays for what it uses.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cpu_steps import Cast, Contender, Job, Network, Samples, Stepper
from numpy.typing import NDArray

from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.errors import DitcastError
from ditcast.progress import say
from ditcast.runtime import machine
from ditcast.runtime.backends import BACKENDS

PACKAGES = ("torch", "diffusers", "onnx", "openvino", "nncf")
CALIBRATION_STEPS = 8  # one network input of each step of such a trajectory
OPSET = 21
INPUTS = ("hidden_states", "timestep", "class_labels")
ONNX, IR, FEEDS = "model.onnx", "model.xml", "feeds.safetensors"


class UnavailableError(DitcastError):
    """A rival that cannot run on this machine; the message says why in one line."""


def _torch(job: Job, *, dtype: str, compiled: bool) -> Network:
    import torch
    from diffusers import DiTTransformer2DModel

    torch.set_num_threads(job.threads)
    kind = getattr(torch, dtype)
    model = DiTTransformer2DModel.from_pretrained(
        job.folder("weights"), torch_dtype=kind, low_cpu_mem_usage=False, local_files_only=True
    ).eval()
    call = torch.compile(model) if compiled else model

    @torch.inference_mode()
    def run(x: Samples, timestep: NDArray[np.int64], labels: NDArray[np.int64]) -> Samples:
        rows = torch.from_numpy(x).to(kind)
        time, classes = torch.from_numpy(timestep), torch.from_numpy(labels)
        found: Samples = call(rows, timestep=time, class_labels=classes).sample.float().numpy()
        return found

    return Network(run, {"precision": dtype, "compiled": compiled})


def _onnxruntime(job: Job, *, artifact: str) -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    path = str(job.folder(artifact) / ONNX)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(*rows: NDArray[Any]) -> Samples:
        found: Samples = session.run(None, dict(zip(INPUTS, rows, strict=True)))[0]
        return found

    return Network(run, {"precision": "float32" if artifact == "onnx" else "int8"})


def _openvino(job: Job, *, artifact: str, file: str) -> Network:
    import openvino

    core = openvino.Core()
    model = core.read_model(job.folder(artifact) / file)
    rows = 2 * job.batch  # static: the kernels are chosen for this batch
    shapes = ([rows, *job.model.sample_shape], [rows], [rows])
    model.reshape(dict(zip(INPUTS, shapes, strict=True)))
    options = {"INFERENCE_NUM_THREADS": job.threads}
    compiled = core.compile_model(model, "CPU", options)
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()

    def run(*rows: NDArray[Any]) -> Samples:
        found: Samples = compiled(dict(zip(INPUTS, rows, strict=True)))[0]
        return found

    return Network(run, {"precision": precision})


def _make_weights(job: Job, folder: Path) -> None:
    """The model as diffusers saves it; random weights are drawn as `ditcast.models` draws them."""
    import torch
    from diffusers import DiTTransformer2DModel

    from ditcast.models import source

    name = job.model.source
    if name.startswith("random:"):
        torch.manual_seed(source.RANDOM_SEED)
        model = DiTTransformer2DModel(**source.RANDOM[name.removeprefix("random:")])
    else:
        with resources.as_file(resources.files("ditcast.assets") / name) as found:
            model = DiTTransformer2DModel.from_pretrained(
                found / "transformer", low_cpu_mem_usage=False, local_files_only=True
            )
    model.save_pretrained(folder)


def _make_onnx(job: Job, folder: Path) -> None:
    """`torch.onnx.export` as its documentation shows it, any batch, weights beside the graph."""
    import torch
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel.from_pretrained(
        job.folder("weights"), low_cpu_mem_usage=False, local_files_only=True
    ).eval()
    x, labels = torch.zeros(2, *job.model.sample_shape), torch.tensor([0, 1])
    feeds = dict(zip(INPUTS, (x, torch.tensor([500, 500]), labels), strict=True))
    rows = {0: torch.export.Dim("rows")}
    torch.onnx.export(
        model,
        (),
        str(folder / ONNX),
        kwargs=feeds | {"return_dict": False},
        dynamic_shapes=dict.fromkeys(INPUTS, rows) | {"return_dict": None},
        input_names=list(INPUTS),
        output_names=["output"],
        opset_version=OPSET,
        external_data=True,
        dynamo=True,
    )


def _make_feeds(job: Job, folder: Path) -> None:
    """Inputs of the network along a short trajectory: what the quantizers calibrate on."""
    stepper = Stepper(job, partial(_onnxruntime, artifact="onnx"))
    seen: list[tuple[NDArray[Any], ...]] = []
    plain = stepper.network.run

    def watch(*rows: NDArray[Any]) -> Samples:
        seen.append(rows)
        return plain(*rows)

    stepper.network = Network(watch, {})
    for _ in stepper.walk(job.recipe.seed, 0, CALIBRATION_STEPS):
        pass
    stacked = dict(zip(INPUTS, map(np.stack, zip(*seen, strict=True)), strict=True))
    tensors.save(stacked, folder / FEEDS)


def _feeds(job: Job) -> list[dict[str, NDArray[Any]]]:
    stacked, _ = tensors.load(job.folder("feeds") / FEEDS)
    return [{name: stacked[name][i] for name in INPUTS} for i in range(CALIBRATION_STEPS)]


class _Reader:
    """What `quantize_static` takes for a `CalibrationDataReader`."""

    def __init__(self, feeds: list[dict[str, NDArray[Any]]]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._left, None)


def _make_static(job: Job, folder: Path) -> None:
    """`quantize_static` with per-channel weights and everything else at its default."""
    from onnxruntime.quantization import quantize_static

    quantize_static(
        str(job.folder("onnx") / ONNX),
        str(folder / ONNX),
        _Reader(_feeds(job)),
        per_channel=True,
        use_external_data_format=True,
    )


def _make_nncf(job: Job, folder: Path) -> None:
    """`nncf.quantize` for transformers: W8A8, mixed preset, SmoothQuant, fast bias correction."""
    import nncf
    import openvino

    feeds = _feeds(job)
    quantized = nncf.quantize(
        openvino.Core().read_model(job.folder("onnx") / ONNX),
        nncf.Dataset(feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(feeds),
    )
    openvino.save_model(quantized, folder / IR, compress_to_fp16=False)


class Artifact(NamedTuple):
    """Files that a rival is loaded from: what has to be there first, and what makes them."""

    needs: tuple[str, ...]
    make: Callable[[Job, Path], None]


ARTIFACTS = {
    "weights": Artifact((), _make_weights),
    "onnx": Artifact(("weights",), _make_onnx),
    "feeds": Artifact(("onnx",), _make_feeds),
    "static": Artifact(("onnx", "feeds"), _make_static),
    "nncf": Artifact(("onnx", "feeds"), _make_nncf),
}


class Rival(NamedTuple):
    """A row of the table; `artifact` is empty for a bundle, which brings its own files."""

    title: str
    artifact: str
    load: Callable[..., Contender]


def _network(title: str, artifact: str, load: Callable[..., Network], /, **options: Any) -> Rival:
    return Rival(title, artifact, partial(Stepper, load=partial(load, **options)))


FULL, NNCF = "ort-fp32", "openvino-nncf"  # what fidelity is measured against; the strongest peer
RIVALS: dict[str, Rival] = {
    "torch-fp32": _network("torch fp32", "weights", _torch, dtype="float32", compiled=False),
    "torch-fp32-compile": _network(
        "torch fp32, torch.compile", "weights", _torch, dtype="float32", compiled=True
    ),
    "torch-bf16": _network("torch bf16", "weights", _torch, dtype="bfloat16", compiled=False),
    "torch-bf16-compile": _network(
        "torch bf16, torch.compile", "weights", _torch, dtype="bfloat16", compiled=True
    ),
    FULL: _network("ONNX Runtime fp32", "onnx", _onnxruntime, artifact="onnx"),
    "ort-static": _network(
        "ONNX Runtime quantize_static", "static", _onnxruntime, artifact="static"
    ),
    "openvino": _network("OpenVINO", "onnx", _openvino, artifact="onnx", file=ONNX),
    NNCF: _network("OpenVINO + NNCF W8A8", "nncf", _openvino, artifact="nncf", file=IR),
}


def rivals(bundle: Bundle) -> dict[str, Rival]:
    """All of `RIVALS`, then what the bundle is by every backend: by name."""
    recipe, found = bundle.manifest.recipe, dict(RIVALS)
    kinds = {"fp32": "reference"} | ({} if recipe.scheme == "none" else {recipe.scheme: None})
    for backend in BACKENDS:
        for kind, target in kinds.items():
            for cache in dict.fromkeys(("none", recipe.cache)):
                cached = cache != "none"
                name = f"ditcast-{backend}-{kind}" + "-cache" * cached
                title = f"ditcast {kind}, {backend}" + f", {cache}" * cached
                load = partial(Cast, backend=backend, target=target, cache=cache)
                found[name] = Rival(title, "", load)
    return found


def prepare(job: Job, artifact: str) -> None:
    """Make an artifact and what it needs, unless it is there.

    Raises:
        UnavailableError: it cannot be made here.
    """
    if not artifact or job.folder(artifact).is_dir():
        return
    for need in ARTIFACTS[artifact].needs:
        prepare(job, need)
    log = job.folder(f"{artifact}.log")
    say(f"preparing {artifact} of {job.model.source}; what it says goes to {log}")
    made = _child(job, "make", artifact, log)
    say(f"preparing {artifact}: {made['seconds']} s, peak {made['peak_memory_mib']} MiB")


def started(job: Job, name: str) -> dict[str, Any]:
    """Load time, peak memory, size on disk and facts of a rival, from a fresh process.

    It is the second start of such a process: the first may fill a runtime's own caches.

    Raises:
        UnavailableError: it cannot run here.
    """
    log = job.folder(f"{name}.log")
    first = job.folder(f"{name}.{job.bundle.manifest.digest[:12]}.started")
    if not first.is_file():
        _child(job, "start", name, log)
        first.touch()
    found = _child(job, "start", name, log)
    if not rivals(job.bundle)[name].artifact:
        small = _child(job, "small", name, log)
        found["low_memory_peak_mib"] = small["peak_memory_mib"]
    return found


def _child(job: Job, action: str, name: str, log: Path) -> dict[str, Any]:
    """Run this file as a program and read what it found."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, __file__, action, name, str(job.bundle.path), str(job.work)]
        command += [str(job.threads), str(report), str(time.monotonic_ns())]
        with log.open("wb") as output:
            code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
        if not report.is_file():
            memory = ", probably for lack of memory" if code == -9 else ""
            raise UnavailableError(f"its process ended with code {code}{memory}; see {log}")
        found: dict[str, Any] = json.loads(report.read_text())
    if "error" in found:
        raise UnavailableError(found["error"])
    return found


def _make(job: Job, name: str, since_ns: int) -> dict[str, Any]:
    """Make one artifact; it gets its name when it is whole."""
    partial_folder = job.folder(f"{name}.part")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    ARTIFACTS[name].make(job, partial_folder)
    partial_folder.rename(job.folder(name))
    return {"seconds": round((time.monotonic_ns() - since_ns) / 1e9, 1)}


def _start(job: Job, name: str, since_ns: int) -> dict[str, Any]:
    """Load one rival and take its first step, or with a cache its first steps of both kinds."""
    rival = rivals(job.bundle)[name]
    contender = rival.load(job)
    done_ns = contender.turn(0).first_done_ns
    if rival.artifact:
        sizes = [p.stat().st_size for p in job.folder(rival.artifact).rglob("*") if p.is_file()]
    else:
        folder = f"graphs/{contender.facts['target']}/"
        files = job.bundle.manifest.files
        sizes = [entry.size for path, entry in files.items() if path.startswith(folder)]
    return {
        "load_s": round((done_ns - since_ns) / 1e9, 2),
        "size_bytes": sum(sizes),
        "full_steps": contender.full_steps,
        "facts": contender.facts,
    }


def _small(job: Job, name: str, since_ns: int) -> dict[str, Any]:
    """Take a bundle's first steps with as little memory as it can."""
    del since_ns
    partial(rivals(job.bundle)[name].load, low_memory=True)(job).turn(0)
    return {}


def main() -> None:
    """Make an artifact or start a rival; write what was found, or the error, as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("action", choices=("make", "start", "small"))
    parser.add_argument("name")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("report", type=Path)
    parser.add_argument("since_ns", type=int, help="when the process was started")
    args = parser.parse_args()
    try:
        job = Job(bundle=Bundle.open(args.bundle), work=args.work, threads=args.threads)
        action = {"make": _make, "start": _start, "small": _small}[args.action]
        found = action(job, args.name, args.since_ns)
        found["peak_memory_mib"] = round(machine.peak_memory_mib(), 1)
    except Exception as err:  # whatever a rival raises is the reason why it is not in the table
        found = {"error": f"{type(err).__name__}: {' '.join(str(err).split())[:200]}"}
        raise
    finally:
        args.report.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
