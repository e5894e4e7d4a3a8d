"""Judge a trained reference model: a linear probe on its samples, a grid and the loss curve.

The probe is a linear classifier on EfficientNet-Lite0 features of the *training* pictures. It is
asked for the class of held-out pictures and of generated ones: how far the second accuracy
falls below the first says how recognisable the samples are.

    pip install matplotlib 'ditcast[compile,distances]'
    python tools/judge_reference.py build/emoji.npz build/train -o build/judged
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ditcast.calibrate.trajectory import sample
from ditcast.distances import Features, extract
from ditcast.held_out import choose
from ditcast.models import load
from ditcast.runtime.images import save, to_unit
from ditcast.schedule import from_config

BATCH = 62
GRID: tuple[str, ...] = (
    "country-flag",
    "face-smiling",
    "heart",
    "person-role",
    "animal-mammal",
    "food-fruit",
)
GRID += ("transport-ground", "clothing")


def fit_probe(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """Logistic regression with weight decay, by L-BFGS."""
    probe = nn.Linear(features.shape[1], classes)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(probe(features), labels)
        loss = loss + 1e-3 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe


def accuracy(probe: nn.Linear, features: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy."""
    ranked = probe(features).argsort(dim=1, descending=True)
    hit = ranked == labels[:, None]
    return {f"top{k}": round(float(hit[:, :k].any(1).float().mean()), 4) for k in (1, 5)}


def generated(model: Any, labels: list[int], seed: int) -> NDArray[np.float32]:
    """Samples of the labels by 50 DDIM steps at guidance 2."""
    parts = []
    for first in range(0, len(labels), BATCH):
        chunk = labels[first : first + BATCH]
        found = sample(
            model.adapter,
            from_config(model.scheduler),
            sampler="ddim",
            steps=50,
            guidance=2.0,
            seed=seed,
            indices=range(first, first + len(chunk)),
            labels=chunk,
        )
        parts.append(found.numpy())
    return np.concatenate(parts)


def plot_loss(log: Path, path: Path) -> None:
    """The loss curve of a training run, smoothed over 200 steps."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    steps = np.array([entry["step"] for entry in entries])
    losses = np.array([entry["loss"] for entry in entries])
    kernel = np.ones(min(10, len(losses))) / min(10, len(losses))
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.semilogy(steps, losses, alpha=0.3)
    axes.semilogy(steps[len(kernel) - 1 :], np.convolve(losses, kernel, "valid"))
    axes.set(xlabel="step", ylabel="epsilon MSE")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Write grid, loss curve and figures of a run of `tools/train_reference.py`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/judged"))
    parser.add_argument("--images", type=int, default=248)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    data = np.load(args.data)
    model, classes = load(str(args.run / "model")), len(data["classes"])
    plot_loss(args.run / "loss.jsonl", args.output / "loss.png")
    shown = [model.classes.index(name) for name in GRID for _ in range(12)]
    save(generated(model, shown, seed=2), args.output / "samples.png", 2, columns=12)
    network = Features()
    images, labels = choose(data, held_out=False)
    probe = fit_probe(extract(network, images), torch.from_numpy(labels), classes)
    images, labels = choose(data, held_out=True)
    figures = {"held_out": accuracy(probe, extract(network, images), torch.from_numpy(labels))}
    wanted = [i % classes for i in range(args.images)]
    samples = to_unit(generated(model, wanted, seed=1))
    figures["generated"] = accuracy(probe, extract(network, samples), torch.tensor(wanted))
    figures["chance"] = {"top1": round(1 / classes, 4), "top5": round(5 / classes, 4)}
    (args.output / "probe.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
