"""What the report says of each timestep: plans and errors by hand, the rest of a real bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditcast import recipe as recipes
from ditcast import tensors
from ditcast.bundle import Bundle
from ditcast.cache import make_plan
from ditcast.cache.fitted import of_target, recipe_plan
from ditcast.cache.guard import guarded
from ditcast.cache.learned import KEPT, routed
from ditcast.calibrate import calibrate, qparams, router
from ditcast.calibrate.codes import fake_quantize
from ditcast.export import to_onnx
from ditcast.models import LoadedModel
from ditcast.models.base import describe as make_manifest
from ditcast.runtime import Pipeline
from ditcast.runtime.steps import closeness_db, describe, feature_cosine, kinds
from tests.conftest import RECIPE, make_bundle


def test_kinds_of_slots_and_steps() -> None:
    """TaylorSeer of order 1 from the second full step on; one slot held back at step 3."""
    plan = make_plan("taylor", steps=6, interval=2, slots=2)
    assert kinds(plan, plan, plan.full) == ["ffpfpf", "ffpfpf"]
    forecast = np.zeros((6, 2), np.float32)
    forecast[4, 1] = 1
    safe = guarded(plan, forecast, np.full((6, 2), 0.5, np.float32))
    assert kinds(safe, plan, plan.full) == ["ffpfpf", "ffpfhf"]
    hold = make_plan("fora", steps=6, interval=3, slots=1)
    assert kinds(hold, hold, hold.full) == ["frfrrf"]
    assert kinds(hold, hold, np.ones(6, bool)) == ["ffffff"]  # what ran counts


def test_kinds_of_a_learned_plan() -> None:
    """Each slot by its own mask: none of the steps behind the first one is full."""
    router = np.full((4, 3), -KEPT, np.float32)
    router[0] = KEPT
    router[1, 0] = router[2, 1] = router[2, 0] = KEPT
    plan = routed(router)
    assert plan.full.tolist() == [True, False, False, False]
    found = kinds(plan, plan, plan.full)
    assert found == ["fffr", "frfr", "frrr"]
    assert "".join(found).count("r") == round(plan.reused * plan.full.size * 3)
    untrained = make_plan("learned", steps=4, interval=2, slots=3)  # TaylorSeer's steps
    assert kinds(untrained, untrained, untrained.full) == ["ffrf"] * 3


def test_a_router_in_a_bundle(tiny: LoadedModel, tmp_path: Path) -> None:
    """The page shows what each slot does by the router that the bundle holds."""
    logits = np.full((6, 4), KEPT, np.float32)
    logits[1::2, :2] = -KEPT
    file = tmp_path / "router.safetensors"
    router.save(logits, tiny, file)
    keys = {"cache": "learned", "router": str(file), "scheme": "none"}
    bundle = Bundle.create(tmp_path / "b", make_manifest(tiny, recipes.make(RECIPE | keys)))
    calibrate(bundle, tiny)
    pipeline = Pipeline(bundle)
    paths = {"full precision": np.ones((6, 1, 3, 4, 4), np.float32)}
    found = describe(pipeline, "learned", pipeline.plan().full, paths)
    assert found["plan"] == ["frfrfr", "frfrfr", "ffffff", "ffffff"]


def test_closeness_by_hand() -> None:
    """An error of a hundredth of each step's own range is 40 dB; none is the cap."""
    wanted = np.zeros((3, 2, 1, 2, 2), np.float32)
    wanted[:, :, :, 0] = np.array([1, 10, 1], np.float32)[:, None, None, None]
    path = wanted + np.array([0.01, 0.1, 0], np.float32)[:, None, None, None, None]
    assert closeness_db(path, wanted) == pytest.approx([40, 40, 100], abs=0.01)


def test_cosine_of_features(model: LoadedModel, tmp_path: Path) -> None:
    """Those of 6 bits that are stored against full precision's, label by label."""
    bundle = make_bundle(model, tmp_path / "b", scheme="w6a6", temporal="cache", cache="none")
    pipeline, exact = Pipeline(bundle), Pipeline(bundle, target="reference")
    found = feature_cosine(pipeline, exact, [3, 1, 3], 6)
    steps = pipeline.schedule.timesteps(6)
    wanted = []
    for step in steps[:, None]:
        pairs = [
            [p.features([label], step, guided=True)[0][0, i] for p in (pipeline, exact)]
            for label, i in ((1, 0), (3, 0), (3, 1))  # the last is null
        ]
        wanted.append(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]))
    assert found == pytest.approx(wanted, abs=1e-5)
    assert found is not None
    assert 0.9 < min(found) < 0.9999
    assert feature_cosine(exact, exact, [3, 1], 6) is None


def test_balanced_features_do_not_compare(model: LoadedModel, tmp_path: Path) -> None:
    bundle = make_bundle(model, tmp_path / "b", cache="none", balance="smooth")
    exact = Pipeline(bundle, target="reference")
    assert feature_cosine(Pipeline(bundle), exact, [0], 6) is None


def test_what_calibration_found_per_step(model: LoadedModel, tmp_path: Path) -> None:
    """Scales that differ per step, the choice of stored features, and errors of forecasts."""
    keys: dict[str, Any] = {
        "cache": "taylor",
        "guard": "error",
        "fsc": "all",
        "temporal": "select",
        "order": 1,
    }
    bundle = make_bundle(model, tmp_path / "b", **keys)
    pipeline = Pipeline(bundle)
    exact = Pipeline(bundle, target="reference")
    assert feature_cosine(pipeline, exact, [0], 6) is None  # scales stand behind the features
    plan = pipeline.plan()
    paths = dict.fromkeys(("full precision", "w8a8 + cache"), np.ones((6, 1, 3, 4, 4), np.float32))
    found = describe(pipeline, "taylor", plan.full, paths)
    assert bundle.manifest.cache is not None
    assert "".join(found["plan"]).count("h") == bundle.manifest.cache.held_back
    assert found["plan"] == kinds(plan, recipe_plan(bundle.manifest), plan.full)
    fitted = of_target(bundle, "onnxruntime")
    assert fitted.forecast is not None
    np.testing.assert_allclose(np.array(found["forecast_error"]).T, fitted.forecast, rtol=1e-3)
    assert bundle.manifest.quantization is not None
    scales, _ = tensors.load(bundle.file(bundle.manifest.quantization.file))
    for name, ranges in found["ranges"].items():
        assert len(ranges) == 6
        assert set(ranges) <= {float(f"{s:.4g}") for s in scales[f"layers|{name}|activation"]}
    assert "blocks.0.attn.qkv" in found["ranges"]
    module = scales.get("stored|module")
    assert (found["selection"] is None) == (module is None)
    if module is not None:
        assert "".join(found["selection"]).count("m") == int(module.sum())
        assert {len(part) for part in found["selection"]} == {6}


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "absmax"},
        {"method": "percentile", "percentile": 90.0, "fsc": "all", "scheme": "w6a6"},
        {"method": "absmax", "temporal": "tib", "fsc": "tib"},
        {"method": "absmax", "temporal": "tib", "fsc": "none"},
    ],
    ids=["absmax", "clipped", "tib", "one range"],
)
def test_how_large_inputs_are(tiny: LoadedModel, tmp_path: Path, keys: dict[str, Any]) -> None:
    """In the order of the network, at calibration's own steps, beside what codes can represent."""
    bundle = make_bundle(tiny, tmp_path / "b", cache="none", **keys)
    pipeline = Pipeline(bundle)
    paths = {"full precision": np.ones((3, 1, 3, 4, 4), np.float32)}
    found = describe(pipeline, "none", np.ones(3, bool), paths)
    inputs, held = found["inputs"], qparams.of_bundle(bundle).layers
    assert inputs["timesteps"] == pipeline.schedule.timesteps(6).tolist()
    assert bundle.manifest.quantization is not None
    names = [layer.name for layer in bundle.manifest.quantization.layers]
    assert list(inputs["largest"]) == list(inputs["representable"]) == names
    clipped = 0
    for name in names:
        layer, largest = held[name], inputs["largest"][name]
        assert layer.peak is not None
        assert layer.activation is not None
        assert largest == pytest.approx(layer.peak.tolist(), rel=1e-3)
        limits = layer.activation.flip(0) if layer.activation.numel() > 1 else layer.activation
        far = torch.full((6,), 1e9) * torch.tensor([[1.0], [-1.0]])
        if layer.zero_point is None:
            far = far[:1]  # the range is symmetric but for one code
        zero = torch.zeros(1) if layer.zero_point is None else layer.zero_point.flip(0)
        wanted = fake_quantize(far, limits, zero, layer.bits.activation).abs().amax(dim=0)
        assert inputs["representable"][name] == pytest.approx(wanted.tolist(), rel=1e-3)
        clipped += sum(a > 1.01 * b for a, b in zip(largest, wanted.tolist(), strict=True))
    assert (clipped > 0) == (keys["method"] == "percentile")
    steps = {name: len(scales) for name, scales in found["ranges"].items()}
    assert set(steps.values()) <= {3}  # those of the run
    assert bool(steps) == (keys.get("fsc", "none") != "none")


def test_inputs_of_an_earlier_version(tiny: LoadedModel, tmp_path: Path) -> None:
    """Its calibration has not kept them, and opens as before; and nothing else has any."""
    bundle = make_bundle(tiny, tmp_path / "b", cache="none")
    paths = {"full precision": np.ones((6, 1, 3, 4, 4), np.float32)}
    assert bundle.manifest.quantization is not None
    name = bundle.manifest.quantization.file
    arrays, _ = tensors.load(bundle.file(name), lambda name: not name.endswith("|peak"))
    tensors.save(arrays, bundle.staged(name))
    bundle.commit({})
    to_onnx(bundle, tiny, ["onnxruntime"])
    older = Pipeline(Bundle.open(bundle.path))
    assert describe(older, "none", np.ones(6, bool), paths)["inputs"] is None
    exact = Pipeline(make_bundle(tiny, tmp_path / "c", scheme="none"))
    assert describe(exact, "none", np.ones(6, bool), paths)["inputs"] is None
    wide = make_bundle(tiny, tmp_path / "d", scheme="w4a16", cache="none")
    found = describe(Pipeline(wide), "none", np.ones(6, bool), paths)["inputs"]
    assert found["largest"] == found["representable"] == {}
