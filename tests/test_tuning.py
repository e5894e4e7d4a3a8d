"""The search for a recipe: it finds the best point, resumes, and says when nothing pays."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ditcast import recipe as recipes
from ditcast import tuning
from ditcast.bundle import Bundle
from ditcast.tuning import Goal, Point, choose, describe, pareto, search, start
from tests.conftest import RECIPE, Cli

GOAL = Goal(max_loss=0.02, count=4, seed=1, fixed={})
DEFAULT = Point(scheme="w8a8", method="absmax", cache="output", interval=4, order=2)
LOSS = {"none": 0.0, "w8a8": 1.0, "w7a8": 2.0, "w4a8": 7.0}
SPEED = {"none": 1.0, "w8a8": 1.6, "w7a8": 1.5, "w4a8": 1.7}


def model(point: Point) -> Iterator[dict[str, float]]:
    """A machine without noise: longer intervals are faster and worse, and fora is the worst."""
    psnr, speed = 46.0 - LOSS[point.scheme], SPEED[point.scheme]
    if point.cache != "none":
        psnr -= (3.0 if point.cache == "fora" else 2.0) * point.interval
        speed *= 1 + 0.5 * (point.interval - 1)
    if point.scheme != "none" and point.method == "absmax":
        psnr -= 0.5
    for samples in (2, 4):
        yield {"speedup": speed, "psnr_db": psnr, "samples": samples}


def points(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was tried, in order."""
    return [entry["point"] for entry in found]


def test_a_point_at_least_as_good_as_the_default(tmp_path: Path) -> None:
    """The best of this model is w8a8 with taylor at interval 5: 4.8 times at 35 dB."""
    found = search(tmp_path, GOAL, model, first=DEFAULT, steps=50, trials=40)
    assert len(found) == 40
    best = choose(found, GOAL)
    assert best is not None
    assert best["psnr_db"] >= GOAL.min_psnr == pytest.approx(33.98, abs=0.01)
    assert points(found)[0] == asdict(DEFAULT) == asdict(start(recipes.make({})))
    assert best["speedup"] > next(model(DEFAULT))["speedup"]


def test_a_search_that_was_killed_goes_on_as_it_would_have(tmp_path: Path) -> None:
    """In the middle of a trial, twice; the same points in the same order."""
    wanted = search(tmp_path, GOAL, model, first=DEFAULT, steps=50, trials=14)
    other = tmp_path / "killed"
    other.mkdir()
    calls = 0

    def killed(point: Point) -> Iterator[dict[str, float]]:
        nonlocal calls
        calls += 1
        for figures in model(point):
            yield figures
            if calls in (3, 9):
                raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search(other, GOAL, killed, first=DEFAULT, steps=50, trials=14)
    found = search(other, GOAL, killed, first=DEFAULT, steps=50, trials=14)
    assert found == wanted
    assert choose(found, GOAL) == choose(wanted, GOAL)


def test_the_time_is_that_of_all_runs_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six trials of ten seconds each: in one run, or in two of which the first was killed."""
    clock = 0.0
    monkeypatch.setattr("time.monotonic", lambda: clock)

    def slow(point: Point) -> Iterator[dict[str, float]]:
        nonlocal clock
        clock += 10
        if clock == 40:
            raise KeyboardInterrupt
        yield from model(point)

    asked: dict[str, Any] = {"first": DEFAULT, "steps": 50, "trials": 40, "seconds": 55}
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, GOAL, slow, **asked)
    assert "tuning: 3 of 40 done, at most 25 s left; " in capsys.readouterr().err  # 55 - 3 * 10
    found = search(tmp_path, GOAL, slow, **asked)
    whole = tmp_path / "whole"
    whole.mkdir()
    clock = 100.0
    assert found == search(whole, GOAL, slow, **asked)
    assert 6 <= len(found) < 40


def test_hopeless_points_are_given_up_and_known_ones_are_not_measured_again(
    tmp_path: Path,
) -> None:
    measured: list[Point] = []

    def watched(point: Point) -> Iterator[dict[str, float]]:
        measured.append(point)
        yield from model(point)

    found = search(tmp_path, GOAL, watched, first=DEFAULT, steps=50, trials=30)
    assert len(measured) == len(set(measured)) < 30
    for entry in found:
        hopeless = entry["psnr_db"] < GOAL.min_psnr - tuning.HOPELESS_DB
        assert entry["samples"] == (2 if hopeless else 4)


def test_keys_that_are_given_are_not_searched(tmp_path: Path) -> None:
    """And intervals are not longer than the trajectory."""
    goal = Goal(max_loss=0.02, count=4, seed=1, fixed={"scheme": "w4a8", "cache": "fora"})
    base = recipes.make({"steps": 3, "interval": 1, "order": 4, **goal.fixed})
    found = search(tmp_path, goal, model, first=start(base), steps=3, trials=10)
    assert {(p["scheme"], p["cache"], p["order"]) for p in points(found)} == {("w4a8", "fora", 0)}
    assert {p["interval"] for p in points(found)} <= {2, 3}


@pytest.mark.parametrize(("sampler", "forecasts"), [("ddim", True), ("ddpm", False)])
def test_outputs_are_not_forecast_over_fresh_noise(
    tmp_path: Path, sampler: str, forecasts: bool
) -> None:
    """DDPM's caches are searched without the one that a recipe would refuse."""
    base = recipes.make({"sampler": sampler})
    goal = Goal(max_loss=0.02, count=4, seed=1, fixed={}, caches=tuning.caches(base))
    found = search(tmp_path, goal, model, first=start(base), steps=50, trials=30)
    assert ("output" in {point["cache"] for point in points(found)}) == forecasts


def test_the_pareto_set_and_the_choice_by_hand() -> None:
    """The fastest that loses no more than was asked, and only if it is faster at all."""
    figures = [(1.0, 100.0), (1.8, 40.0), (1.7, 38.0), (3.0, 34.5), (4.0, 30.0), (1.02, 60.0)]
    found = [{"speedup": speed, "psnr_db": psnr} for speed, psnr in figures]
    assert [entry["speedup"] for entry in pareto(found)] == [4.0, 3.0, 1.8, 1.02, 1.0]
    assert choose(found, GOAL) == found[3]
    strict = Goal(max_loss=0.0005, count=4, seed=1, fixed={})  # 66 dB
    assert choose(found, strict) is None
    assert choose([found[5]], GOAL) is None


def test_another_search_in_the_same_folder(tmp_path: Path) -> None:
    from ditcast.errors import BundleError

    search(tmp_path, GOAL, model, first=DEFAULT, steps=50, trials=1)
    other = Goal(max_loss=0.05, count=4, seed=1, fixed={})
    with pytest.raises(BundleError, match=r"holds a search with max_loss 0.02, asked for 0.05"):
        search(tmp_path, other, model, first=DEFAULT, steps=50, trials=1)


def test_tuning_a_model(cli: Cli, tiny_dir: Path, tmp_path: Path) -> None:
    """From a model to a recipe that can be compiled; what was compiled is used again."""
    keys = [f"--{key}={RECIPE[key]}" for key in ("steps", "samples", "batch")]
    command = ("tune", tiny_dir, "-o", tmp_path / "t", *keys, "--max-loss", 0.9, "--images", 3)
    done = cli(*command, "--trials", 2, "--scheme", "w8a8", "--method", "absmax")
    assert done.code == 0, done.err
    assert "Pareto set" in done.out
    recipe = recipes.load(tmp_path / "t" / "recipe.yaml", {})
    assert (recipe.steps, recipe.samples) == (6, 4)
    table = json.loads((tmp_path / "t" / "tune.json").read_text())
    assert len(table["trials"]) == 2
    assert all(entry["samples"] == 3 for entry in table["trials"])
    if table["chosen"] is None:
        assert "keep full precision: none of 2 trials is faster" in done.out
        assert (recipe.scheme, recipe.cache) == ("none", "none")
    else:
        point = table["chosen"]["point"]
        assert (recipe.scheme, recipe.cache) == (point["scheme"], point["cache"])
    Bundle.open(tmp_path / "t" / "bundles" / "w8a8-absmax.bundle").verify()
    done = cli(*command, "--trials", 2, "--scheme", "w8a8", "--method", "absmax")
    assert done.code == 0
    assert "exporting" not in done.err
    done = cli(*command, "--trials", 2, "--scheme", "w8a8")
    assert done.code == 2
    assert "holds a search with fixed" in done.err


def test_full_precision_is_a_recipe_too(tmp_path: Path) -> None:
    """Where nothing pays that is what is written."""
    base = recipes.make({"steps": 20, "cache": "fora"})
    assert tuning.write(tmp_path, base, GOAL, []) is None
    found = recipes.load(tmp_path / "recipe.yaml", {})
    assert (found.steps, found.scheme, found.cache) == (20, "none", "none")
    point = Point(scheme="none", method="absmax", cache="none", interval=1, order=0)
    assert describe(point) == "full precision"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--max-loss", 0), "max_loss: got 0.0, expected a share between 0 and 1"),
        (("--max-loss", "nan"), "max_loss: got nan, expected a share"),
        (("--max-loss", 0.1, "--temporal", "tib"), "with rules, a group or --temporal other than"),
        (
            ("--max-loss", 0.1, "--placement", "fitted"),
            "placement: got fitted, expected even; tune finds",
        ),
        (("--max-loss", 0.1, "--backend", "gpu"), "gpu"),
        ((), "Missing option '--max-loss'"),
    ],
)
def test_bad_requests(
    cli: Cli, tiny_dir: Path, tmp_path: Path, arguments: tuple[object, ...], line: str
) -> None:
    done = cli("tune", tiny_dir, "-o", tmp_path / "t", *arguments)
    assert (done.code, done.out) == (2, "")
    assert line in done.err
    assert not (tmp_path / "t").exists()


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ditcast.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'ditcast\[tune\]'"):
        search(tmp_path, GOAL, model, first=DEFAULT, steps=50, trials=1)
