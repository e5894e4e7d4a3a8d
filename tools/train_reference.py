"""Train the embedded class-conditional DiT in pixel space; stop and resume at any time.

Epsilon prediction on the 1000-step linear DDPM schedule, 10 % label dropout for
classifier-free guidance, EMA weights, loss weighted by min-SNR-5 (Hang et al. 2023). Every
draw of step k comes from a generator seeded by (seed, k), so a resumed run continues as the
uninterrupted one would. Raise `--steps` to train a finished run further.

    python tools/train_reference.py build/emoji.npz -o build/train --steps 4000
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CHECKPOINT = "checkpoint.safetensors"
NULL_SHARE = 0.1
WARM_UP = 200
DECAY_SHARE = 0.2  # the last fifth of the steps, in which the learning rate falls to zero
EMA = 0.9985
SNR_CAP = 5.0


def build_model(classes: int) -> DiTTransformer2DModel:
    """The DiT at its start: modulations and output zero, so every block is the identity."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=3,
        out_channels=3,
        num_layers=8,
        sample_size=32,
        patch_size=4,
        num_embeds_ada_norm=classes,
    )
    zero = [block.norm1.linear for block in model.transformer_blocks]
    for layer in (*zero, model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    # In train() the label embedder of *every* block drops labels on its own, so the joint
    # null label would never be seen. There is no other dropout: eval() trains correctly.
    return model.eval()


def picture_weights(labels: NDArray[Any], emoji: NDArray[Any]) -> NDArray[np.float64]:
    """Draw probability of each picture: classes by the root of their emoji count, then emoji."""
    weights = np.zeros(len(labels))
    for label in np.unique(labels):
        inside = labels == label
        names, index, counts = np.unique(emoji[inside], return_inverse=True, return_counts=True)
        weights[inside] = np.sqrt(len(names)) / (len(names) * counts[index])
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, constant, linear fall to zero."""
    return peak * min(1.0, (step + 1) / WARM_UP, (steps - step) / (DECAY_SHARE * steps))


def supports_bf16() -> bool:
    """Whether this processor multiplies bf16 natively; emulated bf16 is slower than fp32."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "_bf16" in flags.read_text()


class Run:
    """Model, EMA, optimizer and data of one training run, kept under a folder."""

    def __init__(self, data: Path, folder: Path, seed: int) -> None:
        """Load the training pictures, and the checkpoint where the folder has one."""
        arrays = np.load(data)
        train = ~arrays["held_out"]
        self.classes = [str(name) for name in arrays["classes"]]
        self.images, self.labels = arrays["images"][train], arrays["labels"][train]
        self.weights = picture_weights(self.labels, arrays["emoji"][train])
        self.folder, self.seed, self.step, self.seconds = folder, seed, 0, 0.0
        torch.manual_seed(seed)
        self.model = build_model(len(self.classes))
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.99), weight_decay=0.0
        )
        self.scheduler = DDPMScheduler(beta_schedule="linear", clip_sample=False)
        alphas = self.scheduler.alphas_cumprod
        self.loss_weight = (alphas / (1 - alphas)).clamp(max=SNR_CAP) / (alphas / (1 - alphas))
        if (folder / CHECKPOINT).exists():
            self.load()

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images in [-1,1], labels (some null), noise and stratified timesteps of this step."""
        rng = np.random.default_rng([self.seed, self.step])
        index = rng.choice(len(self.images), size, p=self.weights)
        images = torch.from_numpy(self.images[index]).permute(0, 3, 1, 2).float() / 127.5 - 1
        null = rng.random(size) < NULL_SHARE
        labels = np.where(null, len(self.classes), self.labels[index])
        noise = torch.from_numpy(rng.standard_normal(images.shape, np.float32))
        timesteps = ((np.arange(size) + rng.random(size)) / size * 1000).astype(np.int64)
        return images, torch.from_numpy(labels), noise, torch.from_numpy(timesteps)

    def train_step(self, size: int, rate: float, bf16: bool) -> float:
        """One optimizer step; returns the unweighted mean squared error."""
        images, labels, noise, timesteps = self.batch(size)
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = self.model(noisy, timestep=timesteps, class_labels=labels).sample
        error = (output.float() - noise).square().mean(dim=(1, 2, 3))
        (error * self.loss_weight[timesteps]).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(EMA, (1 + self.step) / (10 + self.step))
        parameters = zip(self.ema.parameters(), self.model.parameters(), strict=True)
        for mean, value in parameters:
            mean.lerp_(value.detach(), 1 - decay)
        self.step += 1
        return float(error.detach().mean())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a checkpoint holds, by name."""
        found = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        found |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for name, value in self.model.named_parameters():
            for key, moment in self.optimizer.state.get(value, {}).items():
                found[f"adam.{key}.{name}"] = moment
        return found

    def save(self) -> None:
        """Write the checkpoint, by temporary file and rename, then the fp16 EMA model."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"step": self.step, "seconds": round(self.seconds), "seed": self.seed}
        partial = self.folder / "checkpoint.tmp"
        save_file(self.tensors(), partial, {"state": json.dumps(state)})
        partial.replace(self.folder / CHECKPOINT)
        model = self.folder / "model"
        copy.deepcopy(self.ema).half().save_pretrained(model / "transformer")
        self.scheduler.save_pretrained(model / "scheduler")
        (model / "classes.json").write_text(json.dumps(self.classes, indent=1) + "\n")

    def load(self) -> None:
        """Continue from the checkpoint."""
        with safe_open(self.folder / CHECKPOINT, "pt") as file:
            state = json.loads(file.metadata()["state"])
        self.step, self.seconds, self.seed = state["step"], state["seconds"], state["seed"]
        tensors = load_file(self.folder / CHECKPOINT)
        for prefix, module in (("model.", self.model), ("ema.", self.ema)):
            inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            module.load_state_dict(inside)
        for name, value in self.model.named_parameters():
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[value] = {key: tensors[f"adam.{key}.{name}"] for key in keys}


def train(run: Run, args: argparse.Namespace) -> None:
    """Train to `args.steps`, with a line in `loss.jsonl` every 20 steps."""
    losses: list[float] = []
    run.folder.mkdir(parents=True, exist_ok=True)
    while run.step < args.steps:
        started = time.perf_counter()
        rate = learning_rate(run.step, args.steps, args.lr)
        losses.append(run.train_step(args.batch, rate, args.bf16))
        run.seconds += time.perf_counter() - started
        if run.step % 20 == 0:
            entry = {"step": run.step, "loss": float(np.mean(losses)), "s": round(run.seconds)}
            losses.clear()
            with (run.folder / "loss.jsonl").open("a") as log:
                log.write(json.dumps(entry) + "\n")
            print(entry, flush=True)
        if run.step % args.save_every == 0 or run.step == args.steps:
            run.save()


def main() -> None:
    """Start or resume a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the file that tools/emoji_dataset.py wrote")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/train"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=supports_bf16())
    args = parser.parse_args()
    train(Run(args.data, args.output, args.seed), args)


if __name__ == "__main__":
    main()
