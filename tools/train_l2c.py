"""Train a router as Learning-to-Cache does, to compare HarmoniCa's with.

L2C (Ma et al. 2024, arXiv 2406.01733) pairs the steps: a full one, then one that may reuse. Only
the second ones have a score per slot. Training takes pictures: each is noised to the timestep of
a full step, which fills the cache; the step behind it is pulled to what it would be without
reuse. There is no guidance, and one label in ten is null.

The price of computing, a hyper-parameter there, follows from the wanted share of reused slots,
as in `ditcast.calibrate.router`. Half of all slots can be reused at most.

    python tools/emoji_dataset.py -o build/emoji.npz
    python tools/train_l2c.py emoji --data build/emoji.npz --steps 50 --reuse 0.3 -o l2c.safetensors
    ditcast compile emoji -o l2c.bundle --cache learned --router l2c.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import Parser, tool
from torch import Tensor, nn

from ditcast.cache.learned import KEPT, routed
from ditcast.calibrate import router
from ditcast.errors import ConfigError
from ditcast.models import LoadedModel, load
from ditcast.progress import counting
from ditcast.sampling import Coefficients, coefficients, update
from ditcast.schedule import from_config

RATE, SMOOTHING, NULL_SHARE = 0.03, 0.9, 0.1  # of AdamW, of what slots are worth, of labels


class Pairs:
    """Scores of the second step of every pair, in training."""

    def __init__(self, model: LoadedModel, args: argparse.Namespace) -> None:
        """Load the pictures that the model was trained on."""
        arrays = np.load(args.data)
        train = ~arrays["held_out"]
        self.images, self.labels = arrays["images"][train], arrays["labels"][train]
        self.model, self.steps, self.batch = model, args.steps, args.batch
        self.rng = np.random.default_rng(args.seed)
        adapter, slots = model.adapter, len(model.adapter.slots)
        self.partial: Any = adapter.steps["partial"]
        self.schedule = from_config(model.scheduler)
        self.timesteps = self.schedule.timesteps(args.steps)
        self.table = coefficients(self.schedule, "ddim", args.steps).tolist()
        draws = self.rng.standard_normal((args.steps, slots)).astype(np.float32)
        self.rho = [nn.Parameter(torch.from_numpy(row)) for row in draws]
        self.optimizers = [torch.optim.AdamW([row], lr=RATE, weight_decay=0) for row in self.rho]
        self.worth = torch.full((args.steps, slots), torch.nan)
        self.share = args.reuse

    def features(self, step: int, labels: Tensor) -> Tensor:
        """The temporal features (N, F) of a step."""
        t = torch.tensor([float(self.timesteps[step])])
        unique, inverse = labels.unique(return_inverse=True)
        found: Tensor = self.model.adapter.temporal(t, unique)[0][inverse]
        return found

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Pictures noised to a step's timestep, and their labels, some of them null."""
        index = self.rng.integers(0, len(self.images), self.batch)
        pictures = torch.from_numpy(self.images[index]).permute(0, 3, 1, 2).float() / 127.5 - 1
        noise = torch.from_numpy(self.rng.standard_normal(pictures.shape, np.float32))
        alpha = float(self.schedule.alphas_cumprod[self.timesteps[step]])
        null = self.rng.random(self.batch) < NULL_SHARE
        labels = np.where(null, self.model.adapter.null_label, self.labels[index])
        noisy = alpha**0.5 * pictures + (1 - alpha) ** 0.5 * noise
        return noisy, torch.from_numpy(labels).long()

    def train_step(self) -> None:
        """One pair of one batch."""
        first = 2 * int(self.rng.integers(0, self.steps // 2))
        step, ones = first + 1, torch.ones(len(self.rho[0]))
        x, labels = self.draw(first)
        with torch.no_grad():
            nothing = [None] * len(ones)
            output, *cache = self.partial.soft(x, self.features(first, labels), ones, nothing)
            row, channels = Coefficients(*self.table[first]), x.shape[1]
            x = update(x, output[:, :channels], None, row, self.schedule.clip)
            features = self.features(step, labels)
            wanted = self.partial.soft(x, features, ones, cache)[0]
        scores = self.rho[step].sigmoid()
        error = (self.partial.soft(x, features, scores, cache)[0] - wanted).square().mean()
        (slope,) = torch.autograd.grad(error, scores, retain_graph=True)
        known = self.worth[step].isfinite()
        smooth = SMOOTHING * self.worth[step] - (1 - SMOOTHING) * slope
        self.worth[step] = torch.where(known, smooth, -slope)
        (error + self.price() * scores.sum()).backward()
        self.optimizers[step].step()
        self.optimizers[step].zero_grad()
        self.rho[step].data.clamp_(-KEPT, KEPT)

    def price(self) -> float:
        """What the wanted share of the slots is not worth."""
        known = self.worth[self.worth.isfinite()]
        return max(float(known.quantile(min(2 * self.share, 1.0))), 1e-12)

    def router(self) -> Any:
        """The logits (T, slots): first steps of pairs compute everything."""
        logits = torch.stack([row.data for row in self.rho]).numpy()
        second = router.meet(np.concatenate([logits[:1], logits[1::2]]), self._of_second())[1:]
        found = np.full(logits.shape, KEPT, np.float32)
        found[1::2] = second
        return found

    def _of_second(self) -> float:
        """The share of all slots as one of the second steps' and one row more."""
        rows = self.steps // 2
        return float(self.share * self.steps / (rows + 1))


def parse() -> argparse.Namespace:
    """The arguments; what is wrong with them is a `ConfigError`."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model")
    add("--data", type=Path, required=True, help="what tools/emoji_dataset.py wrote")
    add("--steps", type=int, default=50)
    add("--reuse", type=float, default=0.3, help="share of slots that are reused")
    add("--iterations", type=int, default=2000)
    add("--batch", type=int, default=8)
    add("--seed", type=int, default=0)
    add("-o", "--output", type=Path, required=True, help="a .safetensors file")
    return parser.parse_args()


@tool("train_l2c")
def main() -> None:
    """Train and write: exit 2 for wrong usage or input, in one line."""
    args = parse()
    if not 0 < args.reuse < 0.5:
        raise ConfigError(f"reuse: got {args.reuse}, expected a share between 0 and 0.5")
    if args.steps < 2 or args.steps % 2:
        raise ConfigError(f"steps: got {args.steps}, expected an even number from 2")
    if not args.data.is_file():
        raise ConfigError(f"data: no file {args.data}; make it with tools/emoji_dataset.py")
    if not args.output.parent.is_dir():
        raise ConfigError(f"output: no folder {args.output.parent}; create it first")
    model = load(args.model)
    if "partial" not in model.adapter.steps:
        raise ConfigError(f"model: got {args.model}, which has no partial steps; expected a DiT")
    pairs = Pairs(model, args)
    with counting("training the router", args.iterations) as advance:
        for _ in range(args.iterations):
            pairs.train_step()
            advance()
    found = pairs.router()
    router.save(found, model, args.output)
    print(f"{args.output}: reuses {routed(found).reused:.1%} of all slots")


if __name__ == "__main__":
    main()
