"""`--backend auto`: measure every installed backend once on this machine, and remember."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import numpy as np

from ditcast.bundle import Bundle
from ditcast.errors import ConfigError, DitcastError, MissingDependencyError, UnsupportedError
from ditcast.progress import say, tell
from ditcast.runtime.audit import GOLDEN_LIMIT_DB, golden_step
from ditcast.runtime.backends import BACKENDS, ENGINES, Backend, make_backend
from ditcast.runtime.backends.loadcache import folder, machine_facts
from ditcast.runtime.machine import versions
from ditcast.settings import Settings

AUTO = "auto"
ROUNDS = 3


def open_backend(name: str, bundle: Bundle, settings: Settings | None = None) -> Backend:
    """The backend of that name; for `auto` the one that is fastest on this bundle here.

    Raises:
        ConfigError, MissingDependencyError: as `make_backend`.
        UnsupportedError: `auto`, and no backend runs this bundle.
    """
    settings = settings or Settings()
    if name != AUTO:
        return make_backend(name, settings)
    settings.thread_count()  # a bad number is the user's mistake, not a backend that cannot run
    place = folder() / "choices" / f"{_key(bundle, settings)}.json"
    if place.is_file():
        try:
            found = json.loads(place.read_text())
            say(f"backend auto: {found['name']} ({found['why']}, remembered in {place})")
            return make_backend(found["name"], settings)
        except (ValueError, KeyError, TypeError, DitcastError):
            say(f"backend auto: {place} is not readable any more; measuring again")
    backend, why = _measure(bundle, settings)
    say(f"backend auto: {backend.name} ({why})")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps({"name": backend.name, "why": why}) + "\n")
    except OSError as err:
        tell(f"backend auto: the choice was not kept in {place} ({err.strerror})")
    return backend


def check_backend(name: str, settings: Settings, policy: str = "none") -> None:
    """Refuse a backend that cannot run here, or not with a cache policy, before the long work.

    Raises:
        ConfigError, MissingDependencyError: as `make_backend`.
    """
    settings.thread_count()
    if name in ENGINES:
        raise ConfigError(
            f"backend: {name} runs engines, which are built of a bundle that is there; run: "
            "ditcast compile MODEL -o BUNDLE --target tensorrt, then: ditcast build BUNDLE "
            f"--backend {name}"
        )
    if name != AUTO:
        check_policy(policy, make_backend(name, settings))


def check_policy(policy: str, backend: Backend) -> None:
    """Refuse a cache policy whose steps a backend does not run well.

    Raises:
        ConfigError: naming others.
    """
    if policy == "learned" and "graph" not in backend.loops:
        raise ConfigError(
            f"cache: got learned, whose branches backend {backend.name} does not run well; "
            "use --backend onnxruntime, or --cache taylor"
        )


def targets_of(name: str) -> tuple[str, ...]:
    """The targets that a bundle for this backend needs; for `auto` those of all installed ones."""
    found = {"onnxruntime"}
    for candidate in BACKENDS if name == AUTO else (name,):
        try:
            found.add(make_backend(candidate).target)
        except MissingDependencyError:
            if name != AUTO:
                raise
    return tuple(sorted(found))


def _key(bundle: Bundle, settings: Settings) -> str:
    """Hash of all that a choice hangs on: graphs, machine, versions and settings."""
    graphs = {
        name: entry.sha256
        for name, entry in bundle.manifest.files.items()
        if name.startswith("graphs/")
    }
    facts = machine_facts(**versions(("ditcast", "onnxruntime", "openvino")))
    parts = (graphs, facts, settings.thread_count(), settings.spin)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _measure(bundle: Bundle, settings: Settings) -> tuple[Backend, str]:
    """The backend with the fastest full step of those that give the golden output."""
    steps: dict[str, Any] = {}
    backends: dict[str, Backend] = {}
    refused = []
    for name in BACKENDS:
        try:
            backend = make_backend(name, settings)
            check_policy(bundle.manifest.recipe.cache, backend)
            run = golden_step(bundle, backend)
            db = run()
        except MissingDependencyError:
            refused.append(f"{name} is not installed")
            continue
        except DitcastError as err:
            refused.append(str(err))
            continue
        if db < GOLDEN_LIMIT_DB:
            refused.append(f"{name} misses the golden step ({db:.1f} dB)")
            continue
        steps[name], backends[name] = run, backend
    if not steps:
        raise UnsupportedError(
            f"backend auto: no backend runs {bundle.path}: {'; '.join(refused)}; "
            "export other targets with: ditcast export BUNDLE --target"
        )
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, run in steps.items():
            time.sleep(0.05)  # until the other runtime's threads sleep
            started = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - started) * 1000)
    medians = {name: float(np.median(ms)) for name, ms in times.items()}
    best = min(medians, key=lambda name: medians[name])
    shown = ", ".join(f"{name} {ms:.0f} ms a step" for name, ms in medians.items())
    return backends[best], "; ".join([shown, *refused])
