"""What the user asked for: one definition for YAML, command-line flags and Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ditcast.errors import ConfigError

Method = Literal["absmax", "minmax", "percentile", "mse"]
Target = Literal["reference", "onnxruntime"]


class Rule(BaseModel):
    """One line of the quantization rules: the first pattern that matches a layer decides.

    `pattern` is a shell pattern over layer names such as `blocks.*.mlp.fc2`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: str
    precision: Literal["int8", "w7a8", "float"]


# Bits of a weight at each precision; activations have 8. Products of 7-bit weights cannot
# saturate in the u8 x s8 kernels of CPUs without VNNI, which are faster than the exact ones.
WEIGHT_BITS = {"int8": 8, "w7a8": 7, "float": 0}
# First and last layers stay in float; the TIB is not part of the denoiser graph at all.
SCHEMES: dict[str, tuple[Rule, ...]] = {
    "w8a8": (
        Rule(pattern="blocks.*", precision="int8"),
        Rule(pattern="final.*", precision="float"),
    ),
    "w7a8": (
        Rule(pattern="blocks.*", precision="w7a8"),
        Rule(pattern="final.*", precision="float"),
    ),
    "none": (Rule(pattern="*", precision="float"),),
}


class Recipe(BaseModel):
    """Everything that decides what a bundle contains.

    Raises:
        ConfigError: from `load` and `make`, naming the key, what it got and what it expects.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(50, ge=1, description="sampler steps")
    sampler: Literal["ddim", "ddpm"] = Field("ddim", description="sampler")
    guidance: float = Field(
        2.0, ge=0, allow_inf_nan=False, description="guidance scale; 1 or less is no guidance"
    )
    scheme: Literal["w8a8", "w7a8", "none"] = Field("w8a8", description="quantization scheme")
    method: Method = Field("absmax", description="range estimator of activations and weights")
    percentile: float = Field(
        99.99, gt=50, le=100, description="share of values inside the range (--method percentile)"
    )
    temporal: Literal["fp"] = Field("fp", description="how temporal features are kept")
    cache: Literal["none", "fora"] = Field("fora", description="cache policy")
    interval: int = Field(3, ge=1, description="steps from one full step to the next")
    samples: int = Field(32, ge=1, description="calibration trajectories")
    batch: int = Field(16, ge=1, description="images per batch while calibrating and measuring")
    seed: int = Field(0, ge=0, description="seed of calibration noise and labels")
    rules: tuple[Rule, ...] = Field((), description="ordered rules, instead of the scheme's")

    @model_validator(mode="after")
    def _interval_fits(self) -> Recipe:
        """An interval longer than the trajectory would be one full step by accident."""
        if self.cache != "none" and self.interval > self.steps:
            raise ValueError(
                f"interval: got {self.interval}, expected at most the number of steps "
                f"({self.steps}); lower --interval or raise --steps"
            )
        return self

    @model_validator(mode="after")
    def _rules_fit(self) -> Recipe:
        """Rules that quantize, under a scheme that does not, are a contradiction."""
        if self.scheme == "none" and any(rule.precision != "float" for rule in self.rules):
            raise ValueError("rules: got a quantized layer under scheme none; expected scheme w8a8")
        return self

    def layer_rules(self) -> tuple[Rule, ...]:
        """The rules that apply: the recipe's own, else those of its scheme."""
        return self.rules or SCHEMES[self.scheme]


def make(values: dict[str, Any]) -> Recipe:
    """Validate recipe keys.

    Raises:
        ConfigError: an unknown key or a value outside its range, all of them in one line.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as err:
        raise ConfigError("recipe: " + "; ".join(_explain(e) for e in err.errors())) from err


def load(path: Path | None, overrides: dict[str, Any]) -> Recipe:
    """The recipe of a YAML file, with `overrides` (command-line flags) on top.

    Raises:
        ConfigError: no such file, no YAML mapping, an unknown key or a bad value.
    """
    values: dict[str, Any] = {}
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"recipe: no file {path}; give a YAML file of recipe keys")
        try:
            found = yaml.safe_load(path.read_bytes())
        except yaml.YAMLError as err:
            problem = " ".join(str(err).split())
            raise ConfigError(f"recipe: {path} is not YAML: {problem}") from err
        if not isinstance(found, dict):
            raise ConfigError(
                f"recipe: {path} holds {type(found).__name__}, expected keys like 'steps: 50'"
            )
        values = found
    return make(values | overrides)


def _explain(error: Any) -> str:
    """One validation error in our grammar."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = Rule.model_fields if key.startswith("rules") else Recipe.model_fields
        return f"unknown key {key!r}; expected one of {', '.join(known)}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{key}: got {error['input']!r}; {error['msg'][0].lower()}{error['msg'][1:]}"
