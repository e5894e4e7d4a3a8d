"""What the user asked for: one definition for YAML, command-line flags and Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ditcast.errors import ConfigError

Method = Literal["absmax", "minmax", "percentile", "mse", "tfmq", "brecq"]
Scheme = Literal["w8a8", "w7a8", "w6a6", "w4a8", "w4a16", "fp8", "none"]
Cache = Literal[
    "none",
    "fora",
    "deepcache",
    "taylor",
    "output",
    "rfe",
    "rcs",
    "relational",
    "learned",
    "first-block",
    "stack",
]
Precision = Literal["w8a8", "w7a8", "w6a6", "w4a8", "w4a16", "fp8", "float"]
E4M3_TOP = 448  # largest number of float8 e4m3, which has no infinity


def levels(bits: int) -> int:
    """Largest code of a signed integer."""
    return int(2 ** (bits - 1) - 1)


class Bits(NamedTuple):
    """Bits of a layer's weight and of its input; 16 is an input that stays in float.

    Both are codes of signed integers, or with `e4m3` floats of 8 bits.
    """

    weight: int
    activation: int
    e4m3: bool = False

    def input_top(self) -> int:
        """The largest code of an input."""
        return E4M3_TOP if self.e4m3 else levels(self.activation)


FLOAT: Literal["float"] = "float"
TEMPORAL = "temporal."  # start of the names of the TIB's layers
# Products of 7-bit weights cannot saturate in the u8 x s8 kernels of CPUs without VNNI, which
# are faster than the exact ones.
PRECISIONS: dict[str, Bits] = {
    "w8a8": Bits(8, 8),
    "w7a8": Bits(7, 8),
    "w6a6": Bits(6, 6),
    "w4a8": Bits(4, 8),
    "w4a16": Bits(4, 16),
    "fp8": Bits(8, 8, e4m3=True),
    FLOAT: Bits(0, 16),
}
DYNAMIC = ("rcs", "relational", "first-block", "stack")  # caches that decide on the way
PLACEABLE = ("taylor", "output")  # caches that forecast over any distance
ORDERED = ("taylor", "output", "rfe", "rcs", "relational")  # caches that have an order
NO_NOISE = (
    "cache: got output with sampler ddpm, whose fresh noise earlier outputs do not know; "
    "expected sampler ddim, or cache taylor"
)
COMPARING = ("rfe", "rcs", "relational", "stack")  # caches that compare inputs across steps
POWER = "power"  # the placement of DeepCache's non-uniform full steps
RANGES = ("absmax", "minmax", "percentile")  # methods that find ranges, and search nothing
MODULES = ("naive", "tib", "select")  # ways to keep the temporal features that run the TIB


class Rule(BaseModel):
    """One line of the quantization rules: the first pattern that matches a layer decides.

    `pattern` is a shell pattern over layer names such as `blocks.*.mlp.fc2`. Layers of the TIB
    are called `temporal.…`; they are asked for only where it is quantized.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: str
    precision: Precision


class Recipe(BaseModel):
    """Everything that decides what a bundle contains.

    Raises:
        ConfigError: from `load` and `make`, naming the key, what it got and what it expects.
        pydantic.ValidationError: from the class itself; prefer `make`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(50, ge=1, description="sampler steps")
    sampler: Literal["ddim", "ddpm"] = Field("ddim", description="sampler")
    guidance: float = Field(
        2.0, ge=0, allow_inf_nan=False, description="guidance scale; 1 or less is no guidance"
    )
    scheme: Scheme = Field("w8a8", description="quantization scheme")
    method: Method = Field("absmax", description="how ranges and roundings are found")
    percentile: float = Field(
        99.99, gt=50, le=100, description="share of values inside the range (--method percentile)"
    )
    balance: Literal["none", "smooth", "ptq4dit"] = Field(
        "none", description="channel balancing between activations and weights"
    )
    group: int = Field(
        0, ge=0, description="inputs that share a weight scale; 0 is all of an output channel's"
    )
    temporal: Literal["fp", "naive", "tib", "cache", "select"] = Field(
        "fp", description="how temporal features are kept"
    )
    fsc: Literal["none", "tib", "all"] = Field(
        "tib", description="where activation ranges are one per step (finite set calibration)"
    )
    tib_outputs: Literal["float", "rounded"] = Field(
        "float", description="outputs of a quantized TIB, as it computes them or rounded too"
    )
    labels: tuple[int, ...] = Field(
        (), description="labels whose temporal features are stored (cache, select); empty is all"
    )
    init: Literal["nearest", "gptq"] = Field(
        "gptq", description="codes that reconstruction starts from"
    )
    iterations: int = Field(
        500, ge=0, description="optimization steps per reconstructed block (papers: 20000)"
    )
    rows: int = Field(1024, ge=1, description="calibration rows that reconstruction sees")
    selection: Literal["uniform", "tap"] = Field(
        "uniform", description="how those are drawn: equally of all steps, or by TAP's clusters"
    )
    trajectories: Literal["full", "cached"] = Field(
        "full", description="sampler that calibration follows: all steps full, or the cache's plan"
    )
    cache: Cache = Field("output", description="cache policy; with sampler ddpm it is taylor")
    interval: int = Field(
        4,
        ge=1,
        description="steps from one full step to the next; policies that decide on the way are "
        "tuned to as many full steps as taylor has",
    )
    order: int = Field(
        2,
        ge=0,
        le=4,
        description="order of the forecast (--cache taylor, output, rfe, rcs, relational)",
    )
    placement: Literal["even", "power", "fitted"] = Field(
        "even",
        description="full steps at equal distances, by a power of them (--cache deepcache), or "
        "where calibration finds samples closest to uncached ones (--cache taylor, output)",
    )
    threshold: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="of policies that decide on the way, instead of one tuned to the interval",
    )
    router: str | None = Field(
        None, description="file of a trained router (--cache learned), instead of training one"
    )
    reuse: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of slots that a router reuses, instead of that of the interval",
    )
    router_epochs: int = Field(
        60, ge=1, description="trajectories that the router is trained on (paper: 2000)"
    )
    router_on: Literal["float", "quantized"] = Field(
        "float", description="network that the router is trained on"
    )
    iepo: Literal["leave_one_out", "cumulative"] = Field(
        "leave_one_out", description="how a step's weight in the router's loss is measured"
    )
    guard: Literal["off", "error", "noise"] = Field(
        "off",
        description="plain reuse where a forecast of quantized outputs is further off (error), "
        "or where the noise that it amplifies is over half of what it predicts (noise)",
    )
    correction: Literal["none", "exact", "moment", "printed"] = Field(
        "none", description="variance correction (VC) of quantized and cached samples"
    )
    samples: int = Field(32, ge=1, description="calibration trajectories")
    batch: int = Field(16, ge=1, description="images per batch while calibrating and measuring")
    seed: int = Field(0, ge=0, description="seed of calibration noise and labels")
    rules: tuple[Rule, ...] = Field((), description="ordered rules, instead of the scheme's")

    @model_validator(mode="before")
    @classmethod
    def _cache_of_sampler(cls, values: Any) -> Any:
        """The default cache forecasts outputs, which fresh noise does not allow."""
        if isinstance(values, dict) and values.get("sampler") == "ddpm":
            return {"cache": "taylor"} | values
        return values

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
    def _cache_fits(self) -> Recipe:
        """What needs a schedule that is known, or inputs that can be compared."""
        if self.cache == "output" and self.sampler == "ddpm":
            raise ValueError(NO_NOISE)
        if self.threshold is not None and self.cache not in DYNAMIC:
            raise ValueError(
                f"threshold: got {self.threshold} with cache {self.cache}, whose full steps the "
                f"interval gives; expected cache {' or '.join(DYNAMIC)}"
            )
        if self.placement == "fitted" and self.cache not in PLACEABLE:
            raise ValueError(
                f"placement: got fitted with cache {self.cache}; expected cache "
                f"{' or '.join(PLACEABLE)}, which forecast over any distance"
            )
        if self.placement == POWER and self.cache != "deepcache":
            raise ValueError(
                f"placement: got {POWER} with cache {self.cache}; expected cache deepcache"
            )
        if self.trajectories == "cached" and self.placement == "fitted":
            raise ValueError(
                "trajectories: got cached with placement fitted, whose full steps are only found "
                "after calibration; expected full"
            )
        if self.trajectories == "cached" and self.cache in (*DYNAMIC, "learned"):
            raise ValueError(
                f"trajectories: got cached with cache {self.cache}, whose full steps are only "
                "found after calibration; expected full"
            )
        for key in ("router", "reuse"):
            if getattr(self, key) is not None and self.cache != "learned":
                raise ValueError(
                    f"{key}: got {getattr(self, key)} with cache {self.cache}; "
                    "expected cache learned"
                )
        if self.router_on == "quantized" and self.scheme == "none":
            raise ValueError("router_on: got quantized under scheme none; expected float")
        if self.fsc == "all" and self.cache in COMPARING:
            raise ValueError(
                f"fsc: got all with cache {self.cache}, which compares inputs of several steps "
                "while each would be divided by its step's scale; expected tib or none"
            )
        return self

    @model_validator(mode="after")
    def _correction_fits(self) -> Recipe:
        """Full precision in all steps needs no correction."""
        if self.correction != "none" and self.scheme == "none" and self.cache == "none":
            raise ValueError(
                f"correction: got {self.correction} with scheme none and cache none, which leave "
                "nothing to correct; expected none"
            )
        return self

    @model_validator(mode="after")
    def _rules_fit(self) -> Recipe:
        """Rules that quantize, under a scheme that does not, are a contradiction."""
        if self.scheme == "none" and any(rule.precision != FLOAT for rule in self.rules):
            raise ValueError("rules: got a quantized layer under scheme none; expected scheme w8a8")
        if self.scheme == "none" and self.temporal != "fp":
            raise ValueError(
                f"temporal: got {self.temporal} under scheme none; expected fp, "
                "or a scheme that quantizes"
            )
        return self

    @model_validator(mode="after")
    def _groups_fit(self) -> Recipe:
        """No integer kernel takes several scales per output channel."""
        kinds = self.precisions() - {FLOAT}
        whole = sorted(kind for kind in kinds if PRECISIONS[kind].activation < 16)
        if self.group and whole:
            raise ValueError(
                f"group: got {self.group} with {whole[0]}, whose kernels take one weight "
                "scale per output channel in every target; use group 0, or scheme w4a16"
            )
        return self

    @model_validator(mode="after")
    def _floats_fit(self) -> Recipe:
        """Searches and reconstruction go over evenly spaced codes."""
        kinds = sorted(kind for kind in self.precisions() if PRECISIONS[kind].e4m3)
        if kinds and self.method not in RANGES:
            raise ValueError(
                f"method: got {self.method} with {kinds[0]}, but it searches among evenly spaced "
                f"codes, which 8-bit floats are not; expected {', '.join(RANGES[:-1])} or "
                f"{RANGES[-1]}"
            )
        return self

    def precisions(self) -> set[str]:
        """All that the rules which apply give to a layer."""
        return {rule.precision for rule in self.layer_rules()}

    def layer_rules(self) -> tuple[Rule, ...]:
        """The rules that apply: the recipe's own, else those of its scheme.

        First and last layers stay in float, and so does the TIB's first Linear (TFMQ-DM code).
        """
        if self.rules or self.scheme == "none":
            return self.rules or (Rule(pattern="*", precision=FLOAT),)
        rules = [Rule(pattern="blocks.*", precision=self.scheme)]
        rules.append(Rule(pattern="final.*", precision=FLOAT))
        if self.temporal in MODULES:
            rules.append(Rule(pattern="temporal.time.*linear_1", precision=FLOAT))
            rules.append(Rule(pattern="temporal.*", precision=self.scheme))
        return tuple(rules)

    def feature_bits(self) -> int:
        """Bits of stored temporal features: those of the scheme's activations."""
        return PRECISIONS[self.scheme].activation


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
