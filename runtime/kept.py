"""What a bundle keeps of its measurements: read, checked, and whether it is still of the bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ditcast.bundle import Bundle
from ditcast.errors import BundleError, ConfigError
from ditcast.progress import tell

FIGURES = "reports/bench.json"
AUDIT = "reports/audit.json"
CHANGED = "it was changed, or is of another bundle"

Values = dict[str, Any]


class _Part(BaseModel):
    """What readers rely on; keys that they do not know may be there too."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Spread(_Part):
    p10: float
    p50: float
    p90: float


class _Interval(_Part):
    value: float
    low: float
    high: float


class _Row(_Part):
    name: str
    target: str
    cache: str
    steps: int
    full_steps: float  # the mean of all batches, where a policy decides on the way
    idle: str | None  # why the cache did nothing, or all that it may
    spacing: str | None
    image_ms: _Spread | None
    full_step_ms: _Spread | None
    reuse_step_ms: _Spread | None
    speedup: _Spread | None
    psnr_db: _Spread | None
    ssim: _Spread | None
    contrast: _Spread | None
    detail: _Spread | None
    broken: dict[str, int]
    fd_to_fp: _Interval | None
    kd_to_fp: _Interval | None
    fd_to_real: _Interval | None
    kd_to_real: _Interval | None
    samples: int
    size_bytes: int
    peak_memory_mib: float | None


class _Request(_Part):
    images: int
    batch: int
    steps: int
    guidance: float
    seed: int


class _Made(_Part):
    model: str
    fingerprint: str
    digest: str
    content: str
    recipe: Values
    random_weights: bool


class _Machine(_Part):
    cpu: str
    cores: int
    date: str
    versions: dict[str, str]


class _Backend(_Part):
    backend: str


class _Both(_Part):
    speedup: _Spread | None
    psnr_db: _Spread | None
    samples: int


class _Inputs(_Part):
    timesteps: list[int]
    largest: dict[str, list[float]]
    representable: dict[str, list[float]]


class _Steps(_Part):
    timesteps: list[int]
    slots: list[str]
    plan: list[Annotated[str, Field(pattern="^[frph]+$")]] | None
    closeness_db: dict[str, list[float]]
    feature_cosine: list[float] | None = None
    forecast_error: list[list[float]] | None
    reuse_error: list[list[float]] | None
    inputs: _Inputs | None = None
    ranges: dict[str, list[float]]
    selection: list[Annotated[str, Field(pattern="^[mc]+$")]] | None


class _Basis(_Part):
    extractor: str
    pictures_per_side: int
    pca_dimensions: int
    interval: str
    real: str
    real_sha256: str


class _Stage(_Part):
    seconds: float
    peak_memory_mib: float
    parts: dict[str, float] = {}


class _Figures(_Part):
    machine: _Machine
    backend: _Backend
    bundle: _Made
    request: _Request
    variants: list[_Row]
    distances: _Basis | None
    interaction: _Both | None
    steps: _Steps
    pictures: dict[str, int] | None
    cost: dict[str, _Stage]
    unpaired_psnr_db: _Spread | None


class _Layer(_Part):
    layer: str
    kernel: str
    precision: str
    integer: bool
    wanted: bool
    latency_ms: float
    share: float
    giga_ops: float


class _Audit(_Part):
    backend: str
    target: str
    content: str
    passed: bool
    golden_db: float
    weight_bits: int
    giga_ops: dict[str, float]
    layers: list[_Layer]
    other_ms: dict[str, float]


def figures(bundle: Bundle) -> Values:
    """What `bench` measured last.

    Raises:
        BundleError: it has measured nothing, or the file was changed, or is of another version of
            ditcast.
    """
    renew = f"ditcast bench {bundle.path}"
    if FIGURES not in bundle.manifest.reports:
        raise BundleError(f"bundle: {bundle.path} has no {FIGURES}; measure with: {renew}")
    bundle.check(FIGURES, f"{CHANGED}; measure again with: {renew}")
    return _read(bundle.file(FIGURES), _Figures, f"measure again with: {renew}")


def current(bundle: Bundle) -> Values:
    """What `bench` measured last, of the graphs that are there.

    Raises:
        BundleError: it has measured nothing, or other graphs.
    """
    found = figures(bundle)
    if is_stale(bundle, found):
        raise BundleError(
            f"bundle: {bundle.path} has changed since {FIGURES} was measured; "
            f"measure again with: ditcast bench {bundle.path}"
        )
    return found


def audit(bundle: Bundle) -> Values | None:
    """What `audit` found last; None where it has not run.

    Raises:
        BundleError: the file was changed, or is of another version of ditcast.
    """
    if AUDIT not in bundle.manifest.reports:
        return None
    again = f"audit again with: ditcast audit {bundle.path}"
    bundle.check(AUDIT, f"{CHANGED}; {again}")
    return _read(bundle.file(AUDIT), _Audit, again)


def load(path: Path) -> Values:
    """The figures of a bundle, or of a file that `bench --json` wrote.

    Raises:
        BundleError: there are none, or not of this version of ditcast.
        ConfigError: there is no such file or bundle.
    """
    if path.is_dir():
        return current(Bundle.open(path))
    if not path.is_file():
        raise ConfigError(
            f"report: no file {path}; give a bundle, or what ditcast bench --json FILE wrote"
        )
    return _read(path, _Figures, "write one with: ditcast bench BUNDLE --json FILE")


def known_cost(bundle: Bundle) -> Values:
    """What the stages cost by the last figures, if these are of the same graphs; else nothing."""
    if FIGURES not in bundle.manifest.reports:
        return {}
    try:
        found: Values = current(bundle)["cost"]
    except BundleError:  # of other graphs, changed, or another version: not what these cost
        return {}
    return found


def keep_audit(bundle: Bundle, target: str, values: Values) -> None:
    """Put an audit's figures into the bundle; says why where that cannot be done."""
    kept = values | {"target": target, "content": bundle.content([target])}
    try:
        bundle.staged(AUDIT).write_text(json.dumps(kept, indent=1) + "\n")
        reports = tuple(sorted({*bundle.manifest.reports, AUDIT}))
        bundle.commit({"reports": reports})
    except (OSError, BundleError) as err:
        reason = err.strerror if isinstance(err, OSError) else err
        tell(f"the audit is not kept in {bundle.path}: {reason}")


def is_stale(bundle: Bundle, found: Values) -> bool:
    """Whether the graphs or the calibration have changed since figures were measured on them."""
    targets = {row["target"] for row in found["variants"]}
    return bool(found["bundle"]["content"] != bundle.content(targets))


def is_stale_audit(bundle: Bundle, found: Values) -> bool:
    """Whether the graphs or the calibration have changed since they were audited."""
    return bool(found["content"] != bundle.content([found["target"]]))


def _read(path: Path, kind: type[_Part], remedy: str) -> Values:
    try:
        values: Values = json.loads(path.read_bytes())
        kind.model_validate(values)
    except ValidationError as err:
        first = err.errors()[0]
        key = ".".join(map(str, first["loc"]))
        problem = f"{key}: {first['msg'].lower()}" if key else "no JSON object"
        raise BundleError(
            f"report: {path} is no report of this version of ditcast ({problem}); {remedy}"
        ) from err
    except ValueError as err:
        raise BundleError(f"report: {path} is not JSON; {remedy}") from err
    return values
