"""Where a model comes from: `emoji`, a diffusers directory, or a published shape at random."""

from __future__ import annotations

import hashlib
import json
import logging
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, UNet2DModel

from ditcast.errors import ConfigError, UnsupportedError
from ditcast.manifest import hash_file
from ditcast.models.base import LoadedModel
from ditcast.models.captions import CAPTIONS, random_captions, read_captions
from ditcast.models.dit import DiTAdapter
from ditcast.models.pixart import PixArtAdapter
from ditcast.models.unet import UNetAdapter

# One line per model family: diffusers class name -> (its class, its adapter). An adapter is made of
# a model and the number of names in `classes.json`, None without it; one that is `captioned` of the
# model's captions too.
ADAPTERS: dict[str, tuple[Any, Any]] = {
    DiTAdapter.architecture: (DiTTransformer2DModel, DiTAdapter),
    PixArtAdapter.architecture: (PixArtTransformer2DModel, PixArtAdapter),
    UNetAdapter.architecture: (UNet2DModel, UNetAdapter),
}
FOLDERS = ("transformer", "unet")  # of a pipeline's directory, where its denoiser may lie
RANDOM_SEED = 0
_DIT = {"in_channels": 4, "out_channels": 8, "sample_size": 32, "patch_size": 2}
# Published shapes (256x256 latents) with seeded random weights: for latency, never fidelity.
RANDOM: dict[str, dict[str, Any]] = {
    "dit-s-2": _DIT | {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64},
    "dit-xl-2": _DIT | {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
    "pixart-xl-2": _DIT
    | {"_class_name": PixArtAdapter.architecture, "caption_channels": 4096, "num_layers": 28}
    | {"num_attention_heads": 16, "attention_head_dim": 72, "cross_attention_dim": 1152}
    | {"interpolation_scale": 0.5, "use_additional_conditions": False},
}
RANDOM_CAPTIONS = (9, 120)  # captions with the null one, and tokens, of such a shape
RANDOM_SCHEDULER = {"_class_name": "DDIMScheduler", "clip_sample": False}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load(model: str) -> LoadedModel:
    """Load MODEL as the command line names it.

    Raises:
        ConfigError: no such model or directory, or one without the expected files.
        UnsupportedError: a model class that has no adapter, or weights in a pickle.
    """
    if model == "emoji":
        with resources.as_file(resources.files("ditcast.assets") / "emoji") as folder:
            return _from_directory("emoji", Path(folder))
    if model.startswith("random:"):
        return _random(model)
    folder = Path(model)
    if not folder.is_dir():
        raise ConfigError(
            f"model: {model!r} is neither 'emoji', 'random:SHAPE' ({', '.join(RANDOM)}) "
            "nor a directory; give one of these"
        )
    return _from_directory(str(folder.resolve()), folder)


def _random(model: str) -> LoadedModel:
    shape = model.removeprefix("random:")
    if shape not in RANDOM:
        raise ConfigError(
            f"model: unknown shape {model!r}; expected random:{', random:'.join(RANDOM)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        config = dict(RANDOM[shape])
        family, adapter = ADAPTERS[config.pop("_class_name", DiTAdapter.architecture)]
        more = {}
        if adapter.captioned:
            more["captions"] = random_captions(*RANDOM_CAPTIONS, config["caption_channels"])
        made = adapter(family(**config), **more)
    origin = f"{model}|{RANDOM_SEED}|torch {torch.__version__}"
    return LoadedModel(
        source=model,
        adapter=made,
        scheduler=RANDOM_SCHEDULER,
        classes=(),
        fingerprint=hashlib.sha256(origin.encode()).hexdigest(),
    )


def _from_directory(source: str, folder: Path) -> LoadedModel:
    """A diffusers pipeline directory: `transformer/` or `unet/`, and `scheduler/`."""
    held = next((folder / name for name in FOLDERS if (folder / name).is_dir()), None)
    denoiser = held or folder / FOLDERS[0]
    config = _json(denoiser / "config.json", folder)
    scheduler = _json(folder / "scheduler" / "scheduler_config.json", folder)
    architecture = str(config.get("_class_name"))
    if architecture not in ADAPTERS:
        raise UnsupportedError(
            f"model: {folder} holds a {architecture} in {denoiser.name}/; "
            f"supported: {', '.join(ADAPTERS)}"
        )
    family, adapter = ADAPTERS[architecture]
    adapter.check(config)  # of a bad config diffusers raises whatever it stumbles over
    weights = sorted(denoiser.glob("*.safetensors"))
    if not weights:
        pickles = [p.name for p in denoiser.iterdir() if p.suffix in PICKLES]
        found = f"a pickle ({pickles[0]}), which can run code," if pickles else "no weights"
        raise UnsupportedError(
            f"model: {denoiser} has {found} where *.safetensors belongs; "
            "save the model with save_pretrained(..., safe_serialization=True)"
        )
    classes, more, files = _class_names(folder), {}, [denoiser / "config.json", *weights]
    if adapter.captioned:
        files.append(folder / CAPTIONS)
        more["captions"] = read_captions(files[-1], config["caption_channels"])
    named = None if classes is None else len(classes)
    return LoadedModel(
        source=source,
        adapter=adapter(_load_weights(family, denoiser), named, **more),
        scheduler=scheduler,
        classes=classes or (),
        fingerprint=_fingerprint(files),
    )


def _load_weights(family: Any, denoiser: Path) -> Any:
    """The model over the weights of a directory, which have to fit its config exactly."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # what it warns of is an error below
    try:
        model, info = family.from_pretrained(
            denoiser,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as err:  # as above
        problem = " ".join(str(err).split())[:200]
        raise ConfigError(
            f"model: the weights in {denoiser} cannot be loaded ({problem}); "
            "save the model again with save_pretrained"
        ) from err
    for key, what in (("missing_keys", "lack"), ("unexpected_keys", "hold, beyond the config,")):
        if info[key]:  # diffusers fills in random weights for the first, and drops the second
            raise ConfigError(
                f"model: the weights in {denoiser} {what} {sorted(info[key])[0]} "
                f"(of {len(info[key])} such tensors); they are of another config.json"
            )
    return model


def _json(path: Path, folder: Path) -> dict[str, Any]:
    """A config file of the directory, or an error that says what a diffusers directory has."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"model: {folder} is no diffusers directory: cannot read "
            f"{path.relative_to(folder)} ({type(err).__name__}); expected transformer/ or "
            "unet/, and scheduler/, as save_pretrained writes them"
        ) from err
    if not isinstance(found, dict):
        raise ConfigError(f"model: {path} holds {type(found).__name__}, expected a JSON object")
    return found


def _class_names(folder: Path) -> tuple[str, ...] | None:
    """Names from an optional `classes.json`, a list with one name per class."""
    path = folder / "classes.json"
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text())
    except ValueError as err:
        raise ConfigError(f"model: {path} is not JSON ({err}); expected a list of names") from err
    if not isinstance(names, list):
        raise ConfigError(
            f"model: {path} holds {type(names).__name__}, expected a list of names, one per class"
        )
    return tuple(str(name) for name in names)


def _fingerprint(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {hash_file(path).sha256}\n".encode())
    return digest.hexdigest()
