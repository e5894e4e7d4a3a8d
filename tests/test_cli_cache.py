"""The command line and the cache: warnings, counts, and what was fitted."""

from __future__ import annotations

import json
from pathlib import Path

from ditcast.bundle import Bundle
from tests.conftest import Cli


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
    assert "cache taylor never reuses: all 4 steps are full" in done.err
    assert not path.exists()


def test_sample_counts_its_steps(cli: Cli, shared_bundle: Bundle, tmp_path: Path) -> None:
    """T=6, N=2: full at 0, 1, 3 and 5."""
    figures = tmp_path / "out.json"
    command = ("sample", shared_bundle.path, "-o", tmp_path / "out.npy", "--labels", 1)
    assert cli(*command, "--json", figures).code == 0
    values = json.loads(figures.read_text())
    assert (values["full_steps"], values["reuse_steps"]) == (4, 2)
