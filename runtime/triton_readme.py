"""The README of a Triton model repository: how to serve it, and what its models take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template

from ditcast import __version__
from ditcast.manifest import Engine, Manifest
from ditcast.sampling import needs_noise

TEMPLATE = Path(__file__).parent / "templates" / "triton.md"
PACKAGES = {"tensorrt": "tensorrt-cu13", "tensorrt-rtx": "tensorrt-rtx-cu13"}
BY_ONNXRUNTIME = """by Triton's onnxruntime backend

`1/model.onnx` is the whole sampler, and needs no Python. Inputs: `noise` FP32 [n, $shape],
`class_labels` INT64 [n], `guidance_scale` FP32 [1]$step_noise. Output: `latents` FP32 [n, $shape].

On x86 CPUs without VNNI, 8-bit weights saturate in it, and Triton cannot set the session option
that prevents it: use `${stem}_host` there, which finds this out itself, or a bundle of `--scheme
w7a8`. It runs on the CPU on a GPU server too: its integer kernels are the CPU's.
"""
BY_PYTHON = """by the Python backend too

Inputs and output are those of `${stem}_host`; `steps` and the cache are those of the bundle. Not by
a backend of Triton's own: $reason.
"""


def readme(
    manifest: Manifest, stem: str, *, backend: str, engines: Sequence[Engine], reason: str
) -> str:
    """The text; `reason` is why the graph loop is run by Python, empty where it is not."""
    recipe, model, stored = manifest.recipe, manifest.model, manifest.stored_labels()
    packages = [f"'ditcast=={__version__}'"]
    if engines:  # a plan runs only in the version that built it
        packages.append(f"'{PACKAGES[backend]}=={engines[0].version}'")
    noises = f", `step_noise` FP32 [{recipe.steps}, n, {_list(model.sample_shape)}]"
    values = {
        "stem": stem,
        "backend": backend,
        "packages": " ".join(packages),
        "gpus": " --gpus all" if engines else "",
        "label": str(stored[0] if stored else 0),
        "labels": f"one of {_list(stored)}" if stored else f"0 to {model.num_classes - 1}",
        "batch": str(recipe.batch),
        "shape": _list(model.sample_shape),
        "steps": str(recipe.steps),
        "guidance": str(recipe.guidance),
        "reason": reason,
        "step_noise": noises if needs_noise(recipe.sampler) else "",
    }
    graph = Template(BY_PYTHON if reason else BY_ONNXRUNTIME).substitute(values)
    return Template(TEMPLATE.read_text()).substitute(values, graph=graph)


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
