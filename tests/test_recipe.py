"""Recipes: one definition for YAML, flags and Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ditcast.errors import ConfigError
from ditcast.recipe import PRECISIONS, load, make


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A file with two keys."""
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 20\nmethod: mse\n")
    return path


def test_flags_go_on_top_of_the_file(recipe_file: Path) -> None:
    """What neither names has its default."""
    found = load(recipe_file, {"steps": 30, "guidance": 4.0})
    assert (found.steps, found.method, found.guidance) == (30, "mse", 4.0)
    assert found.sampler == make({}).sampler
    assert load(None, {}) == make({})


@given(
    steps=st.integers(1, 1000),
    guidance=st.floats(0, 20),
    method=st.sampled_from(["absmax", "minmax", "percentile", "mse", "tfmq", "brecq"]),
    labels=st.lists(st.integers(0, 999), max_size=3),
    rules=st.booleans(),
)
def test_a_recipe_survives_yaml(
    steps: int, guidance: float, method: str, labels: list[int], rules: bool
) -> None:
    """Written as YAML and read again it is the same."""
    values: dict[str, Any] = {"steps": steps, "guidance": guidance, "method": method, "interval": 1}
    values["labels"] = labels
    if rules:
        values["rules"] = [{"pattern": "*.fc2", "precision": "float"}]
    recipe = make(values)
    assert make(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe


def test_rules_of_a_scheme_and_of_a_recipe() -> None:
    """Own rules replace those of the scheme."""
    found = [(rule.pattern, rule.precision) for rule in make({}).layer_rules()]
    assert found == [("blocks.*", "w8a8"), ("final.*", "float")]
    assert {rule.precision for rule in make({"scheme": "none"}).layer_rules()} == {"float"}
    own = make({"rules": [{"pattern": "*", "precision": "float"}]})
    assert [rule.pattern for rule in own.layer_rules()] == ["*"]


@pytest.mark.parametrize("scheme", ["w8a8", "w7a8", "w6a6", "w4a8", "w4a16"])
@pytest.mark.parametrize("temporal", ["fp", "naive", "tib", "cache", "select"])
def test_rules_of_every_scheme(scheme: str, temporal: str) -> None:
    """The TIB has rules only where it is quantized, and its first Linear stays in float."""
    recipe = make({"scheme": scheme, "temporal": temporal})
    found = [(rule.pattern, rule.precision) for rule in recipe.layer_rules()]
    assert found[:2] == [("blocks.*", scheme), ("final.*", "float")]
    inside = [("temporal.time.*linear_1", "float"), ("temporal.*", scheme)]
    assert found[2:] == ([] if temporal in ("fp", "cache") else inside)
    assert recipe.feature_bits() == int(scheme.rpartition("a")[2])
    assert f"w{PRECISIONS[scheme].weight}a{PRECISIONS[scheme].activation}" == scheme


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"stepz": 3}, "recipe: unknown key 'stepz'; expected one of steps, sampler, guidance"),
        ({"steps": 0}, "recipe: steps: got 0; input should be greater than or equal to 1"),
        ({"steps": "many"}, "steps: got 'many'; input should be a valid integer"),
        ({"sampler": "euler"}, "sampler: got 'euler'; input should be 'ddim' or 'ddpm'"),
        ({"guidance": float("nan")}, "guidance: got nan"),
        ({"guidance": -1}, "guidance: got -1"),
        ({"guidance": float("inf")}, "guidance: got inf"),
        (
            {"scheme": "none", "rules": [{"pattern": "*", "precision": "w8a8"}]},
            "rules: got a quantized layer under scheme none; expected scheme w8a8",
        ),
        (
            {"scheme": "none", "temporal": "cache"},
            "temporal: got cache under scheme none; expected fp, or a scheme that quantizes",
        ),
        (
            {"group": 16},
            "group: got 16 with w8a8, whose kernels take one .*; use group 0, or scheme w4",
        ),
        (
            {
                "scheme": "w4a16",
                "group": 16,
                "rules": [
                    {"pattern": "*.fc1", "precision": "w4a8"},
                    {"pattern": "*", "precision": "w4a16"},
                ],
            },
            "group: got 16 with w4a8",
        ),
        *(
            (
                {"scheme": "fp8", "method": method},
                f"method: got {method} with fp8, but it searches among evenly spaced codes, which "
                "8-bit floats are not; expected absmax, minmax or percentile",
            )
            for method in ("mse", "tfmq", "brecq")
        ),
        (
            {"method": "mse", "rules": [{"pattern": "*", "precision": "fp8"}]},
            "method: got mse with fp8",
        ),
        ({"scheme": "fp8", "group": 16}, "group: got 16 with fp8, whose kernels take one weight"),
        ({"scheme": "nvfp4"}, "scheme: got 'nvfp4'; input should be 'w8a8', .*'fp8' or 'none'"),
        ({"group": -1}, "group: got -1; input should be greater than or equal to 0"),
        ({"scheme": "w5a5"}, "scheme: got 'w5a5'; input should be 'w8a8'"),
        ({"iterations": -1}, "iterations: got -1"),
        ({"labels": ["cat"]}, "labels.0: got 'cat'; input should be a valid integer"),
        ({"percentile": 101}, "percentile: got 101"),
        ({"seed": -1}, "seed: got -1"),
        (
            {"steps": 4, "interval": 5},
            r"interval: got 5, expected at most .* steps \(4\); lower --i",
        ),
        (
            {"cache": "fora", "threshold": 0.1},
            "threshold: got 0.1 with cache fora, whose full steps the interval gives; expected",
        ),
        ({"cache": "stack", "threshold": -1}, "threshold: got -1"),
        (
            {"cache": "stack", "trajectories": "cached"},
            "trajectories: got cached with cache stack, whose full steps are only found after",
        ),
        (
            {"cache": "relational", "fsc": "all"},
            "fsc: got all with cache relational, which compares inputs of several steps",
        ),
        (
            {"cache": "fora", "router": "r.safetensors"},
            "router: got r.safetensors with cache fora; expected cache learned",
        ),
        ({"cache": "taylor", "reuse": 0.5}, "reuse: got 0.5 with cache taylor; expected cache lea"),
        ({"cache": "learned", "reuse": 1.0}, "reuse: got 1.0"),
        (
            {"cache": "learned", "scheme": "none", "router_on": "quantized"},
            "router_on: got quantized under scheme none; expected float",
        ),
        ({"rules": "all"}, "rules: got 'all'"),
        (
            {"rules": [{"pattern": "*", "precision": "w8a8", "axis": 0}]},
            "unknown key 'rules.0.axis'; expected one of pattern, precision",
        ),
        ({"rules": [{"pattern": "*", "precision": "int3"}]}, "rules.0.precision: got 'int3'"),
        ({"steps": 0, "batch": 0}, "steps: got 0; .*; batch: got 0"),
        ({1: 2}, "1"),
    ],
)
def test_bad_values_are_one_line(values: dict[str, Any], match: str) -> None:
    """Key, what it got, and what it expects; several at once."""
    with pytest.raises(ConfigError, match=match) as caught:
        make(values)
    assert "\n" not in str(caught.value)


def test_groups_are_for_float_inputs() -> None:
    """Layers whose inputs stay in float run in float kernels, which take any weight scale."""
    assert make({"scheme": "w4a16", "group": 128}).group == 128


def test_without_a_cache_the_interval_does_not_matter() -> None:
    """It is not read, so it cannot be wrong."""
    assert make({"steps": 2, "interval": 9, "cache": "none"}).interval == 9


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"steps: [1", "is not YAML: while parsing a flow sequence"),
        (b"\x80\x81", "is not YAML"),
        (b"\x00", "is not YAML"),
        (b"- steps\n", "holds list, expected keys like 'steps: 50'"),
        (b"steps\n", "holds str, expected keys"),
        (b"", "holds NoneType, expected keys"),
        (
            b"!!python/object/apply:os.mkdir [exploded]",
            "is not YAML: could not determine a construc",
        ),
    ],
)
def test_files_that_are_no_recipe(
    tmp_path: Path, content: bytes, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that is no YAML, no text at all, YAML that is no mapping, YAML that would run code."""
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=match):
        load(Path("bad.yaml"), {})
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Missing, or a folder."""
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=f"recipe: no file {path}; give a YAML file"):
            load(path, {})
