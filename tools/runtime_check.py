"""Check that what was calibrated is what runs: the torch simulation beside ONNX Runtime.

One trajectory of the simulation gives the inputs of some full steps and the codes that enter every
quantized layer there; the integer graph computes the same steps from the same inputs. Then both
sample the same noise.

    python tools/runtime_check.py emoji.bundle --images 16
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from bench_cpu import paired
from command import Parser, tool
from cpu_report import spread
from numpy.typing import NDArray
from quality_run import SEED, Samples, image_labels, sampled
from torch import Tensor, nn

from ditcast.bundle import Bundle
from ditcast.cache.stepping import GRAPHS
from ditcast.calibrate import qparams
from ditcast.calibrate.qparams import QParams
from ditcast.calibrate.simulate import Simulation, quantized
from ditcast.errors import ConfigError
from ditcast.models import LoadedModel, load
from ditcast.progress import say
from ditcast.runtime import Pipeline, machine
from ditcast.runtime.backends import GraphFile, Session, make_backend

SHIFT = 128  # from the simulation's signed codes to those of ONNX Runtime


class Step(NamedTuple):
    """One full step of the simulation: its inputs, and the codes that enter each layer."""

    feeds: dict[str, NDArray[Any]]
    codes: dict[str, NDArray[np.uint8]]


def comparable(held: QParams) -> dict[str, Tensor]:
    """The input scales of the layers whose codes are compared: 8 bits, one scale.

    Raises:
        ConfigError: there are none.
    """
    found = {
        name: scales.activation
        for name, scales in held.layers.items()
        if scales.activation is not None
        and scales.activation.dim() == 0
        and scales.bits.activation == 8
        and not name.startswith("temporal.")
    }
    if not found:
        raise ConfigError(
            "bundle: no layer has 8-bit inputs with one scale for all steps; compile one with: "
            "--scheme w8a8 --fsc tib"
        )
    return found


@contextlib.contextmanager
def watched(
    denoiser: nn.Module, simulation: Simulation, scales: dict[str, Tensor], wanted: Sequence[int]
) -> Iterator[list[Step]]:
    """While active, the steps of these numbers are kept, of the first batch."""
    steps: list[Step] = []
    calls = -1

    def begin(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal calls
        del module
        calls += 1
        if calls in wanted:
            inputs = zip(GRAPHS["full"].inputs, args, strict=True)
            feeds = {name: tensor.numpy().copy() for name, tensor in inputs}
            steps.append(Step(feeds, {}))

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module
            if calls in wanted:
                codes = torch.round(args[0] / scales[name]) + SHIFT
                steps[-1].codes[name] = codes.clamp(0, 255).to(torch.uint8).numpy()

        return simulation.layers[name].register_forward_pre_hook(hook)

    hooks = [denoiser.register_forward_pre_hook(begin), *map(watch, scales)]
    try:
        yield steps
    finally:
        for hook in hooks:
            hook.remove()


def simulated(
    model: LoadedModel, bundle: Bundle, labels: list[int], wanted: list[int]
) -> tuple[Samples, list[Step]]:
    """The simulation's samples, every step full, and some of the first batch's steps."""
    held = qparams.of_bundle(bundle)
    scales = comparable(held)
    with (
        quantized(model.adapter, held) as simulation,
        watched(model.adapter.denoiser, simulation, scales, wanted) as steps,
    ):
        found = sampled(model, bundle.manifest.recipe, labels)
    return found, steps


@contextlib.contextmanager
def giving_codes(bundle: Bundle, layers: Sequence[str]) -> Iterator[Session]:
    """A session of the integer full step that gives the codes of these layers' inputs as well."""
    model = onnx.load(bundle.graph("onnxruntime", "full"))
    for layer in layers:
        kind = onnx.TensorProto.UINT8
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"{layer}/codes", kind, None))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "codes.onnx"
        onnx.save(model, path)
        yield make_backend("onnxruntime").session(GraphFile(path=path))


def differing(session: Session, step: Step) -> dict[str, float]:
    """Per layer, the share of codes that are others in ONNX Runtime from the same inputs."""
    outputs = {name: f"{name}/codes" for name in step.codes}
    codes = session.run(step.feeds, list(outputs.values()))
    return {name: float((codes[outputs[name]] != step.codes[name]).mean()) for name in outputs}


def measure(bundle: Bundle, model: LoadedModel, images: int) -> dict[str, Any]:
    """Both comparisons."""
    recipe = bundle.manifest.recipe
    for target in ("onnxruntime", "reference"):
        bundle.graph(target, "full")  # or say at once how to make it
    stored = bundle.manifest.stored_labels()
    classes = range(model.adapter.num_classes) if stored is None else stored
    labels = image_labels(classes, images)
    wanted = sorted({0, recipe.steps // 2, recipe.steps - 1})
    say(f"sampling {images} images in the torch simulation")
    expected, steps = simulated(model, bundle, labels, wanted)
    with giving_codes(bundle, list(steps[0].codes)) as session:
        shares = [differing(session, step) for step in steps]
    say("sampling them in ONNX Runtime")
    made = Pipeline(bundle).sample(labels, seed=SEED, cache="none")
    full = Pipeline(bundle, target="reference").sample(labels, seed=SEED, cache="none")
    unit = model.adapter.sample_shape[0] == 3
    return {
        "bundle": bundle.manifest.fingerprint(),
        "recipe": recipe.model_dump(mode="json"),
        "images": images,
        "codes_differing": {
            str(step): {
                "first_layer": next(iter(of.values())),
                "mean": float(np.mean(list(of.values()))),
                "max": max(of.values()),
                "layers": of,
            }
            for step, of in zip(wanted, shares, strict=True)
        },
        "psnr_db_to_simulation": spread(paired(made, expected, unit=unit)),
        "psnr_db_to_full_precision": spread(paired(made, full, unit=unit)),
        "machine": machine.describe(),
    }


def show(report: dict[str, Any]) -> None:
    """The same as a few lines."""
    for step, of in report["codes_differing"].items():
        print(
            f"step {step}: of the codes that enter the {len(of['layers'])} layers, other ones: "
            f"{of['mean']:.4%} (mean over layers), {of['max']:.4%} (largest)"
        )
    for key in ("psnr_db_to_simulation", "psnr_db_to_full_precision"):
        print(f"{key}: " + ", ".join(f"{k} {v:.1f}" for k, v in report[key].items()))


@tool("runtime_check")
def main() -> None:
    """Measure and report: exit 2 for wrong usage or input, in one line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="with graphs for onnxruntime and reference")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the figures")
    args: argparse.Namespace = parser.parse_args()
    if args.images < 1:
        raise ConfigError(f"images: got {args.images}, expected at least 1")
    if args.json is not None and not args.json.parent.is_dir():
        raise ConfigError(f"json: no folder {args.json.parent}; create it first")
    bundle = Bundle.open(args.bundle)
    report = measure(bundle, load(bundle.manifest.model.source), args.images)
    show(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
