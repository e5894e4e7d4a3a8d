"""From a model to bundles, for commands that need torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.errors import optional
from ditcast.recipe import Recipe

if TYPE_CHECKING:
    from ditcast.models import LoadedModel


def load_model(source: str) -> LoadedModel:
    """Load a model, or say which extra does."""
    for module in ("torch", "diffusers", "onnx", "onnx_graphsurgeon", "onnxscript"):
        optional(module, "compile")
    from ditcast.models import load

    return load(source)


def compiler(
    loaded: LoadedModel, base: Recipe, folder: Path, backend: str
) -> Callable[[str, str], Bundle]:
    """A function that gives the bundle of a scheme and a method, without a cache, in `folder`.

    What an earlier run compiled is used again.
    """
    from ditcast.calibrate import calibrate
    from ditcast.export import to_onnx
    from ditcast.models.base import describe
    from ditcast.runtime.choice import targets_of

    def compiled(scheme: str, method: str) -> Bundle:
        keys: dict[str, Any] = {"scheme": scheme, "method": method, "cache": "none"}
        keys |= {"guard": "off", "correction": "none", "trajectories": "full"}
        keys |= {"threshold": None, "router": None, "reuse": None, "router_on": "float"}
        keys |= {"placement": "even"}
        recipe = recipes.make(base.model_dump(mode="json") | keys)
        path = folder / "bundles" / f"{scheme}-{method}.bundle"
        bundle = Bundle.create(path, describe(loaded, recipe))
        calibrate(bundle, loaded)
        to_onnx(bundle, loaded, targets_of(backend))
        return bundle

    return compiled
