"""One run of `tools/quality_table.py`: a calibration, and what its quantized model samples.

Calibration happens in a process of its own, whose peak memory nothing else adds to; this file is
also the program of that process: the recipe in by stdin, the figures out by stdout.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ditcast.bundle import Bundle
from ditcast.calibrate import calibrate, qparams
from ditcast.calibrate.features import check_store
from ditcast.calibrate.qparams import QParams
from ditcast.calibrate.simulate import quantized
from ditcast.calibrate.trajectory import sample
from ditcast.errors import ConfigError, DitcastError
from ditcast.models import LoadedModel, load
from ditcast.models.base import describe
from ditcast.recipe import TEMPORAL, Recipe
from ditcast.runtime import machine
from ditcast.schedule import from_config

SEED = 10_000  # of the noise that images are judged on: no calibration's
BUNDLE, FIGURES = "bundle", "calibration.json"
COMPARED_LABELS = 8  # whose temporal features are compared, besides the null label's

Samples = NDArray[np.float32]


def calibrated(model: LoadedModel, recipe: Recipe, folder: Path) -> tuple[QParams, dict[str, Any]]:
    """What calibration finds, and its seconds and memory; made once, then kept in `folder`.

    An interrupted one starts afresh: time and memory of its rest would not be those of a whole.

    Raises:
        DitcastError: calibration failed, or the folder holds that of another model or recipe.
    """
    figures = folder / FIGURES
    if not figures.is_file():
        shutil.rmtree(folder / BUNDLE, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [sys.executable, __file__, model.source, str(folder / BUNDLE)],
            input=recipe.model_dump_json(),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = done.stdout.strip() or f"its process ended with code {done.returncode}"
            raise DitcastError(f"calibration: {reason}")
        figures.write_text(done.stdout)
    bundle = Bundle.create(folder / BUNDLE, describe(model, recipe))
    held = bundle.manifest.quantization
    assert held is not None
    return qparams.load(bundle.file(held.file)), json.loads(figures.read_text())


def storable_labels(model: LoadedModel, recipe: Recipe) -> list[int]:
    """As many labels, evenly spread, as the store of temporal features can hold.

    Raises:
        ConfigError: not even one.
    """
    last = model.adapter.num_classes - 1
    for count in range(last + 1, 0, -1):
        labels = np.linspace(0, last, count).round().astype(int).tolist()
        try:
            check_store(model, recipe.model_copy(update={"labels": tuple(labels)}))
        except ConfigError:
            if count > 1:
                continue
            raise
        return [int(label) for label in labels]
    raise ConfigError("labels: the model has none")


def image_labels(classes: Sequence[int], count: int) -> list[int]:
    """The label of each image: all classes in turn, in an order that `SEED` shuffles."""
    shuffled = np.random.default_rng(SEED).permutation(np.asarray(classes)).tolist()
    return [int(shuffled[i % len(shuffled)]) for i in range(count)]


def sampled(model: LoadedModel, recipe: Recipe, labels: Sequence[int]) -> Samples:
    """Samples of the noise of `SEED` by the adapter as it is now, quantized or not."""
    parts, schedule = [], from_config(model.scheduler)
    for first in range(0, len(labels), recipe.batch):
        chunk = labels[first : first + recipe.batch]
        found = sample(
            model.adapter,
            schedule,
            sampler=recipe.sampler,
            steps=recipe.steps,
            guidance=recipe.guidance,
            seed=SEED,
            indices=range(first, first + len(chunk)),
            labels=chunk,
        )
        parts.append(found.numpy())
    return np.concatenate(parts)


@torch.no_grad()
def compare_features(
    model: LoadedModel, recipe: Recipe, found: QParams, labels: Sequence[int]
) -> dict[str, Any]:
    """How far temporal features turn: e of full precision, e_q of `found`.

    `cosine_per_step` is cos(e[t], e_q[t]), a mean over labels, with the noisiest step first;
    `cosine_mean` and `cosine_min` are those over steps of it; `nearest_share` is how often, of all
    t', e[t'] is nearest to e_q[t] at t' = t.
    """
    steps = torch.from_numpy(from_config(model.scheduler).timesteps(recipe.steps)).float()
    used = [*sorted(set(labels))[:COMPARED_LABELS], model.adapter.num_classes]
    wanted = model.adapter.temporal(steps, torch.tensor(used))
    layers = {name: s for name, s in found.layers.items() if name.startswith(TEMPORAL)}
    with quantized(model.adapter, replace(found, balance={}, layers=layers)):
        made = model.adapter.temporal(steps, torch.tensor(used))
    turned, nearest = [], []
    for label in range(len(used)):
        a, b = (functional.normalize(e[:, label].double(), dim=-1) for e in (made, wanted))
        cosines = a @ b.T
        turned.append(cosines.diagonal())
        nearest.append(cosines.argmax(dim=1) == torch.arange(len(steps)))
    per_step = torch.stack(turned).mean(dim=0)
    return {
        "cosine_mean": float(per_step.mean()),
        "cosine_min": float(per_step.min()),
        "cosine_per_step": per_step.tolist(),
        "nearest_share": float(torch.stack(nearest).double().mean()),
    }


def _noise(images: Tensor) -> Tensor:
    return torch.rand(images.shape, generator=torch.Generator().manual_seed(SEED))


def _blurred(images: Tensor) -> Tensor:
    return functional.avg_pool2d(images, 5, stride=1, padding=2, count_include_pad=False)


# Images that every measure must find bad, made of good ones in [0, 1].
DAMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "black": torch.zeros_like,
    "noise": _noise,
    "blurred": _blurred,
}


def main() -> None:
    """Calibrate into a new bundle: figures as JSON, or exit 2 and the reason."""
    source, path = sys.argv[1:]
    recipe = Recipe.model_validate_json(sys.stdin.read())
    try:
        model = load(source)
        before = machine.peak_memory_mib()
        bundle = Bundle.create(Path(path), describe(model, recipe))
        began = time.monotonic()
        calibrate(bundle, model)
    except DitcastError as err:
        print(err)
        sys.exit(2)
    figures = {
        "seconds": round(time.monotonic() - began, 2),
        "peak_memory_mib": round(machine.peak_memory_mib(), 1),
        "loaded_memory_mib": round(before, 1),  # the peak before it began
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
