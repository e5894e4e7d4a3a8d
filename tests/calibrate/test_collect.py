"""Passes over trajectories and walks over parts, interrupted and taken up again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ditcast import recipe as recipes
from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.calibrate import adaround, blocks, calibrate, qparams, tib
from ditcast.calibrate.collect import Watch, collect, draw_labels
from ditcast.calibrate.ranges import CHANNELS, INPUTS, OBSERVERS
from ditcast.calibrate.trajectory import sample
from ditcast.errors import BundleError, ConfigError
from ditcast.models import LoadedModel
from ditcast.models.base import describe
from ditcast.schedule import from_config
from tests.conftest import RECIPE

QUICK: dict[str, Any] = {"iterations": 4, "rows": 12, "steps": 4}
TIAR = QUICK | {"method": "tfmq", "temporal": "tib"}


def start(model: LoadedModel, path: Path, **keys: Any) -> Bundle:
    """An uncalibrated bundle."""
    return Bundle.create(path, describe(model, recipes.make(RECIPE | keys)))


def calibration(bundle: Bundle) -> bytes:
    """The scales file, byte for byte."""
    assert bundle.manifest.quantization is not None
    return bundle.file(bundle.manifest.quantization.file).read_bytes()


def stop_after(saved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C as soon as a file of that name has been written."""
    replace = Path.replace

    def wrapper(self: Path, target: Path) -> Path:
        found = replace(self, target)
        if Path(target).name == saved:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Path, "replace", wrapper)


def interrupt(
    model: LoadedModel, path: Path, keys: dict[str, Any], saved: str, patch: pytest.MonkeyPatch
) -> None:
    """Leave a bundle there whose calibration ended when it had written that file."""
    with patch.context() as inside:
        stop_after(saved, inside)
        with pytest.raises(KeyboardInterrupt):
            calibrate(start(model, path, **keys), model)
    assert (path / ".staging" / "calibration" / saved).is_file()


@pytest.mark.parametrize(
    ("keys", "saved"),
    [
        ({"method": "mse", "fsc": "all"}, "states.safetensors"),
        ({"balance": "ptq4dit"}, "channels.safetensors"),
        ({"balance": "ptq4dit"}, "states.safetensors"),
        ({"method": "tfmq", "temporal": "tib"}, "tib.safetensors"),
        ({"method": "tfmq", "temporal": "tib"}, "inputs.safetensors"),
        ({"method": "tfmq", "temporal": "tib"}, "part-000.safetensors"),
        ({"method": "brecq", "fsc": "all"}, "part-000.safetensors"),
        ({"method": "brecq", "balance": "smooth"}, "part-001.safetensors"),
        ({"method": "tfmq", "temporal": "naive", "scheme": "w4a8"}, "part-000.safetensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_an_interrupted_run_ends_in_the_same_bytes(
    tiny: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    saved: str,
) -> None:
    """After a batch of every kind of pass, and between two reconstructed parts."""
    whole = start(tiny, tmp_path / "whole", **(QUICK | keys))
    calibrate(whole, tiny)
    interrupt(tiny, tmp_path / "begun", QUICK | keys, saved, monkeypatch)
    resumed = Bundle.open(tmp_path / "begun")
    assert resumed.manifest.quantization is None
    calibrate(resumed, tiny)
    assert calibration(resumed) == calibration(whole)
    assert not (resumed.path / ".staging").exists()


def test_reconstructed_parts_are_not_made_again(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks have layers to reconstruct; after the first one was kept, one is left."""
    keys = QUICK | {"method": "tfmq"}
    interrupt(tiny, tmp_path / "b", keys, "part-000.safetensors", monkeypatch)
    calls: list[int] = []
    reconstruct = adaround.reconstruct

    def counted(*arguments: Any, **options: Any) -> float:
        calls.append(options["iterations"])
        return reconstruct(*arguments, **options)

    monkeypatch.setattr(adaround, "reconstruct", counted)
    calibrate(Bundle.open(tmp_path / "b"), tiny)
    assert calls == [4]


def test_a_reconstructed_tib_is_not_made_again(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(tiny, tmp_path / "b", TIAR, "tib.safetensors", monkeypatch)
    monkeypatch.setattr(tib, "tiar", None)
    calibrate(Bundle.open(tmp_path / "b"), tiny)
    assert Bundle.open(tmp_path / "b").manifest.quantization is not None


@pytest.mark.parametrize(
    ("keys", "part"),
    [(QUICK | {"method": "tfmq"}, "part-000.safetensors"), (TIAR, "tib.safetensors")],
    ids=["part", "tib"],
)
def test_an_unreadable_part_is_made_again(
    tiny: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    part: str,
) -> None:
    """What a dying disk left of a part is not fatal, only lost."""
    whole = start(tiny, tmp_path / "whole", **keys)
    calibrate(whole, tiny)
    interrupt(tiny, tmp_path / "b", keys, part, monkeypatch)
    (tmp_path / "b" / ".staging" / "calibration" / part).write_bytes(b"not safetensors")
    resumed = Bundle.open(tmp_path / "b")
    calibrate(resumed, tiny)
    assert calibration(resumed) == calibration(whole)


@pytest.mark.parametrize(
    ("keys", "saved"),
    [
        (QUICK | {"method": "tfmq"}, "part-000.safetensors"),
        (QUICK | {"method": "absmax"}, "states.safetensors"),
        (TIAR, "tib.safetensors"),
    ],
    ids=["part", "states", "tib"],
)
def test_work_on_another_recipe_is_refused(
    tiny: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    saved: str,
) -> None:
    """Also where the manifest was removed in between, so that nothing else tells them apart."""
    interrupt(tiny, tmp_path / "b", keys, saved, monkeypatch)
    (tmp_path / "b" / "manifest.json").unlink()
    other = start(tiny, tmp_path / "b", **(keys | {"seed": 1}))
    with pytest.raises(BundleError, match="is of another model or recipe; remove it to start"):
        calibrate(other, tiny)


def test_a_pass_of_an_earlier_version_is_made_again(
    tiny: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It has not kept how large inputs were: half of them would look like all."""
    keys = QUICK | {"method": "absmax"}
    whole = start(tiny, tmp_path / "whole", **keys)
    calibrate(whole, tiny)
    interrupt(tiny, tmp_path / "b", keys, "states.safetensors", monkeypatch)
    file = tmp_path / "b" / ".staging" / "calibration" / "states.safetensors"
    found, metadata = tensors.load(file, lambda name: not name.startswith("peaks|"))
    tensors.save(found, file, metadata)
    resumed = Bundle.open(tmp_path / "b")
    calibrate(resumed, tiny)
    assert "starting afresh, what an interrupted run left has no peaks" in capsys.readouterr().err
    assert calibration(resumed) == calibration(whole)


TRAJECTORIES, BLOCKS, CACHE = "trajectories and ranges", "reconstruction of blocks", "cache: "


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"method": "absmax", "cache": "none"}, [TRAJECTORIES]),
        (TIAR | {"temporal": "select"}, ["TIB", "stored features", TRAJECTORIES, BLOCKS]),
        ({"temporal": "naive", "cache": "none"}, [TRAJECTORIES, "TIB"]),
        (
            {"cache": "taylor", "order": 1, "guard": "error", "correction": "exact"},
            [TRAJECTORIES, f"{CACHE}noise guard", f"{CACHE}correction"],
        ),
        ({"scheme": "none", "cache": "taylor", "placement": "fitted"}, [f"{CACHE}placement"]),
        ({"scheme": "none", "cache": "none"}, []),
    ],
    ids=["ranges", "select", "naive", "guard", "placement", "nothing"],
)
def test_each_part_is_timed(
    tiny: LoadedModel, tmp_path: Path, keys: dict[str, Any], parts: list[str]
) -> None:
    """All that there is to do, nothing else, and nothing when it is done."""
    bundle = start(tiny, tmp_path / "b", **keys)
    started = time.perf_counter()
    found = calibrate(bundle, tiny)
    assert list(found) == parts
    assert all(seconds > 0 for seconds in found.values())
    assert sum(found.values()) <= time.perf_counter() - started
    assert not (tmp_path / "b" / ".staging").exists()
    assert calibrate(bundle, tiny) == {}


def test_a_resumed_run_adds_what_was_spent_before(
    tiny: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the same model and recipe, as far as it is known."""
    keys = TIAR | {"cache": "none"}
    file = tmp_path / "b" / ".staging" / "cost" / "seconds.json"
    interrupt(tiny, tmp_path / "b", keys, "part-000.safetensors", monkeypatch)
    ((fingerprint, spent),) = json.loads(file.read_text()).items()
    assert list(spent) == ["TIB", TRAJECTORIES]  # of the part that was kept last it is not known
    left = {fingerprint: spent | {"TIB": 1000.0}, "of another recipe": {"TIB": 5000.0}}
    file.write_text(json.dumps(left))
    found = calibrate(Bundle.open(tmp_path / "b"), tiny)
    assert 1000 < found["TIB"] < 2000  # its ranges were measured again
    assert found[TRAJECTORIES] == spent[TRAJECTORIES]
    assert found[BLOCKS] > 0
    interrupt(tiny, tmp_path / "c", keys, "part-000.safetensors", monkeypatch)
    (tmp_path / "c" / ".staging" / "cost" / "seconds.json").write_bytes(b"\xff")
    capsys.readouterr()
    assert calibrate(Bundle.open(tmp_path / "c"), tiny)["TIB"] < 1000
    assert "what an interrupted run has cost is unreadable" in capsys.readouterr().err


@pytest.fixture
def watches(tiny: LoadedModel) -> Iterator[Callable[[], list[Watch]]]:
    """One watch of each kind, on two layers and the stem."""
    linears = tiny.adapter.layers()
    qkv, fc2 = linears["blocks.0.attn.qkv"], linears["blocks.1.mlp.fc2"]

    def make() -> list[Watch]:
        return [
            Watch("whole", qkv, OBSERVERS["absmax"]),
            Watch("steps", qkv, OBSERVERS["absmax"], stepwise=True),
            Watch("channels", fc2, CHANNELS, stepwise=True),
            Watch("inputs", tiny.adapter.stem, INPUTS, stepwise=True),
        ]

    yield make
    assert not qkv._forward_pre_hooks  # nothing is left behind
    assert not fc2._forward_pre_hooks


def test_a_pass_sees_every_step_of_every_trajectory(
    tiny: LoadedModel, tmp_path: Path, watches: Callable[[], list[Watch]]
) -> None:
    """Together or step by step, both rows of guidance; and inputs in the order of trajectories."""
    bundle = start(tiny, tmp_path / "b")
    found, _ = collect(bundle, tiny, "test", watches())
    assert {name: len(states) for name, states in found.items()} == {
        "whole": 1,
        "steps": 6,
        "channels": 6,
        "inputs": 6,
    }
    each = [float(state["absmax"]) for state in found["steps"]]
    assert max(each) == float(found["whole"][0]["absmax"])
    assert len(set(each)) == 6
    assert found["channels"][0]["channels"].shape == (256,)
    inputs = [state["inputs"] for state in found["inputs"]]
    assert {x.shape for x in inputs} == {(8, 3, 16, 16)}  # 4 trajectories, twice with guidance
    first = inputs[0].unflatten(0, (2, 2, 2))  # batches of two: two conditional rows, two null
    assert torch.equal(first[:, 0], first[:, 1])  # both start at the same noise
    last = inputs[5].unflatten(0, (2, 2, 2))
    wanted = by_hand(tiny, bundle)
    torch.testing.assert_close(last[:, 0].flatten(0, 1), wanted, rtol=0, atol=1e-4)


def by_hand(tiny: LoadedModel, bundle: Bundle) -> Tensor:
    """What enters the last step of the recipe's trajectories, (samples, C, H, W)."""
    recipe = bundle.manifest.recipe
    return sample(
        tiny.adapter,
        from_config(tiny.scheduler),
        sampler=recipe.sampler,
        steps=recipe.steps,
        guidance=recipe.guidance,
        seed=recipe.seed,
        indices=range(recipe.samples),
        labels=draw_labels(recipe, tiny.adapter.num_classes),
        stop_after=recipe.steps - 1,
    )


@pytest.mark.parametrize("method", ["absmax", "tfmq"])
def test_ranges_of_a_bin_are_those_of_its_step(
    tiny: LoadedModel, tmp_path: Path, method: str
) -> None:
    """Bins ascend with the timestep, trajectories descend: the last step has the first bin.

    With `tfmq`, rows are all there are, one mini-batch per step, and no weight lies before qkv.
    """
    name = "blocks.0.attn.qkv"
    watch = Watch("x", tiny.adapter.layers()[name], OBSERVERS["absmax"], stepwise=True)
    states = collect(start(tiny, tmp_path / "a"), tiny, "test", [watch])[0]["x"]
    seen = [float(state["absmax"]) / 127 for state in states]
    bundle = start(tiny, tmp_path / "b", method=method, fsc="all", rows=48, iterations=1)
    calibrate(bundle, tiny)
    assert bundle.manifest.quantization is not None
    held = qparams.load(bundle.file(bundle.manifest.quantization.file)).layers[name].activation
    assert held is not None
    torch.testing.assert_close(held.flip(0), torch.tensor(seen), rtol=1e-4, atol=0)
    assert len(set(seen)) == 6


def test_without_guidance_there_are_no_null_rows(
    tiny: LoadedModel, tmp_path: Path, watches: Callable[[], list[Watch]]
) -> None:
    found, _ = collect(start(tiny, tmp_path / "b", guidance=1.0), tiny, "test", watches())
    assert found["inputs"][0]["inputs"].shape == (4, 3, 16, 16)


def test_overflow_is_found_by_every_pass(
    tiny: LoadedModel, tmp_path: Path, watches: Callable[[], list[Watch]]
) -> None:
    """Whatever is watched."""
    bundle = start(tiny, tmp_path / "b", guidance=1e38)
    with pytest.raises(ConfigError, match="NaN or Inf in the sample at step 0"):
        collect(bundle, tiny, "test", watches())


def spied_rows(monkeypatch: pytest.MonkeyPatch) -> list[blocks.Rows]:
    """What reconstruction will be given."""
    seen: list[blocks.Rows] = []

    class Spy(blocks.Walk):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            seen.append(self.rows)

    monkeypatch.setattr("ditcast.calibrate.stage.Walk", Spy)
    return seen


def test_reconstruction_takes_equally_many_rows_of_every_step(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn from conditional and null rows, with the label, timestep and bin of each."""
    seen = spied_rows(monkeypatch)
    bundle = start(tiny, tmp_path / "b", method="tfmq", iterations=1, rows=27, fsc="all")
    calibrate(bundle, tiny)
    (rows,) = seen
    assert rows.sample.shape == (24, 3, 16, 16)  # 27 // 6 of each of 6 steps
    timesteps = [830.0, 664.0, 498.0, 332.0, 166.0, 0.0]
    assert rows.timesteps.tolist() == [t for t in timesteps for _ in range(4)]
    assert rows.bins.tolist() == [b for b in (5, 4, 3, 2, 1, 0) for _ in range(4)]
    assert bundle.manifest.quantization is not None
    allowed = {*bundle.manifest.quantization.labels, tiny.adapter.num_classes}
    assert set(rows.labels.tolist()) <= allowed
    assert tiny.adapter.num_classes in rows.labels
    # At the first step, a row's noise says which trajectory it is of, and so its label.
    states, _ = collect(
        start(tiny, tmp_path / "c"), tiny, "t", [Watch("i", tiny.adapter.stem, INPUTS, True)]
    )
    inputs = states["i"][3]["inputs"]  # batches of two: labels, labels, null, null
    labels, null = list(bundle.manifest.quantization.labels), tiny.adapter.num_classes
    of_row = [*labels[:2], null, null, *labels[2:], null, null]
    for row, label in zip(rows.sample[12:16], rows.labels[12:16].tolist(), strict=True):
        places = [i for i, x in enumerate(inputs) if torch.equal(x, row)]
        assert label in {of_row[i] for i in places}
        assert places
