"""The command line and the cache: warnings, counts, and what was fitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ditcast import recipe as recipes
from ditcast.bundle import Bundle
from ditcast.calibrate import calibrate
from ditcast.models import LoadedModel
from ditcast.models.base import describe
from tests.conftest import RECIPE, Cli


def test_a_cache_that_never_triggers_is_a_warning(
    cli: Cli, shared_bundle: Bundle, tmp_path: Path
) -> None:
    """With its reason; an error under --strict; and no word where there is no cache."""
    command = ("sample", shared_bundle.path, "-o", tmp_path / "out.npy", "--labels", 1)
    assert cli(*command, "--cache", "none", "--strict").err == ""
    arguments = ("--cache", "taylor", "--steps", 2)
    done = cli(*command, *arguments)
    warning = (
        "cache taylor never reuses: all 2 steps are full; take a longer interval or more steps"
    )
    assert done.code == 0
    assert f"warning: {warning}" in done.err
    done = cli(*command, *arguments, "--strict")
    assert (done.code, done.out) == (2, "")
    assert warning in done.err


def test_a_compile_that_would_never_reuse_is_refused_under_strict(
    cli: Cli, tiny_dir: Path, tmp_path: Path
) -> None:
    """Before a bundle is started."""
    path = tmp_path / "b"
    done = cli("calibrate", tiny_dir, "-o", path, "--strict", "--interval", 1, "--steps", 4)
    assert done.code == 2
    assert "cache output never reuses: all 4 steps are full" in done.err
    assert not path.exists()


def test_sample_counts_its_steps(cli: Cli, shared_bundle: Bundle, tmp_path: Path) -> None:
    """T=6, N=2: full at 0, 1, 3 and 5."""
    figures = tmp_path / "out.json"
    command = ("sample", shared_bundle.path, "-o", tmp_path / "out.npy", "--labels", 1)
    assert cli(*command, "--json", figures).code == 0
    values = json.loads(figures.read_text())
    assert (values["full_steps"], values["reuse_steps"]) == (4, 2)


def test_inspect_says_what_was_fitted(cli: Cli, tiny: LoadedModel, tmp_path: Path) -> None:
    """The guard's count, the correction and the order; of a bundle without them, nothing."""
    keys: dict[str, Any] = {"cache": "taylor", "order": 2, "interval": 3, "steps": 8}
    keys |= {"guard": "error", "correction": "moment"}
    bundle = Bundle.create(tmp_path / "b", describe(tiny, recipes.make(RECIPE | keys)))
    calibrate(bundle, tiny)
    assert bundle.manifest.cache is not None
    said = cli("inspect", bundle.path).out
    held_back = bundle.manifest.cache.held_back
    assert f"{held_back} of 16 forecasts are plain reuse" in said
    assert "taylor, interval 3, 4 slots, order 2" in said
    assert any(line.split() == ["correction", "moment"] for line in said.splitlines())
    plain = Bundle.create(tmp_path / "plain", describe(tiny, recipes.make(RECIPE)))
    said = cli("inspect", plain.path).out
    assert "noise guard" not in said
    assert "correction" not in said
    assert "order" not in said
