"""What calibration found, on disk, and the rules that choose its layers."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditcast import tensors
from ditcast.calibrate.codes import weight_limits
from ditcast.calibrate.qparams import (
    LayerScales,
    OutputScales,
    QParams,
    StoredFeatures,
    load,
    save,
    select,
)
from ditcast.errors import ConfigError
from ditcast.recipe import Bits, Rule


def found() -> QParams:
    """One of everything, with all optional parts there in one layer and none in another."""
    generator = torch.Generator().manual_seed(0)
    return QParams(
        layers={
            "temporal.modulation.0": LayerScales(
                bits=Bits(4, 6),
                weight=torch.tensor([0.1, 0.2]),
                codes=torch.randint(-8, 8, (2, 11), generator=generator, dtype=torch.int8),  # odd
                activation=torch.tensor([0.5, 0.25, 1.0]),
                zero_point=torch.tensor([-3.0, 0.0, 7.0]),
            ),
            "blocks.0.mlp.fc1": LayerScales(
                bits=Bits(8, 8), weight=torch.tensor([0.3]), activation=torch.tensor(0.75)
            ),
            "blocks.0.mlp.fc2": LayerScales(bits=Bits(4, 16), weight=torch.ones(3, 2)),
        },
        edges=torch.tensor([100.5, 700.5]),
        balance={"blocks.0.mlp.fc1": torch.tensor([1.5, 0.5])},
        outputs=OutputScales(torch.ones(3, 2), torch.full((3, 2), -5.0), 6),
        stored=StoredFeatures(
            timesteps=torch.tensor([900.0, 10.0]),
            labels=torch.tensor([0, 3, 5]),
            codes=torch.randint(-32, 32, (2, 3, 4), generator=generator).to(torch.int8),
            scale=torch.rand(2, 3, 2, generator=generator),
            zero_point=torch.zeros(2, 3, 2),
            module=torch.tensor([[True, False], [False, False]]),
        ),
    )


def flat(value: Any) -> dict[str, Any]:
    """All values of a nested structure by their paths."""
    if isinstance(value, Tensor):
        return {"": (value.dtype, value.tolist())}
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, OutputScales):
        items = list(value._asdict().items())
    elif isinstance(value, QParams | LayerScales | StoredFeatures):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    else:
        return {"": value}
    return {f"{key}/{path}": leaf for key, of in items for path, leaf in flat(of).items()}


@pytest.mark.parametrize(
    "absent", [{}, {"stored": None}, {"outputs": None}, {"balance": {}}, {"layers": {}}]
)
def test_everything_survives_the_disk(tmp_path: Path, absent: dict[str, Any]) -> None:
    """Every value with its type, whatever is missing, and equal values are equal bytes."""
    held = replace(found(), **absent)
    save(held, tmp_path / "one")
    save(replace(found(), **absent), tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert flat(load(tmp_path / "one")) == flat(held)


def test_nothing_survives_the_disk_too(tmp_path: Path) -> None:
    """Nothing quantized, no bins, nothing stored."""
    save(QParams(), tmp_path / "file")
    assert flat(load(tmp_path / "file")) == flat(QParams())
    assert not load(tmp_path / "file")


def test_8_bit_floats_survive_the_disk(tmp_path: Path) -> None:
    """And a file of before there were any holds integers."""
    bits, path = Bits(8, 8, e4m3=True), tmp_path / "file"
    layer = LayerScales(bits=bits, weight=torch.ones(2), activation=torch.tensor(0.5))
    save(QParams(layers={"layer": layer}), path)
    assert flat(load(path).layers["layer"]) == flat(layer)
    arrays, _ = tensors.load(path)
    arrays["layers|layer|bits"] = arrays["layers|layer|bits"][:2]
    tensors.save(arrays, path)
    assert load(path).layers["layer"].bits == Bits(8, 8)


@given(
    outputs=st.integers(1, 5),
    inputs=st.integers(1, 40),
    bits=st.sampled_from([4, 6, 8]),
    seed=st.integers(0, 99),
)
def test_codes_survive_the_disk(
    outputs: int, inputs: int, bits: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two of 4 bits to a byte, whatever their number; both limits among them."""
    low, high = weight_limits(bits)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high + 1, (outputs, inputs), generator=generator, dtype=torch.int8)
    codes[0, 0], codes[-1, -1] = low, high
    path = tmp_path_factory.getbasetemp() / "codes"
    layer = LayerScales(bits=Bits(bits, 8), weight=torch.ones(outputs), codes=codes)
    save(QParams(layers={"layer": layer}), path)
    found = load(path).layers["layer"].codes
    assert found is not None
    assert torch.equal(found, codes)


def test_a_code_of_4_bits_takes_4_bits(tmp_path: Path) -> None:
    """The file of a large model would otherwise be as large as the model."""
    layer = LayerScales(bits=Bits(4, 8), weight=torch.ones(64))
    save(QParams(layers={"layer": layer}), tmp_path / "without")
    rounded = replace(layer, codes=torch.ones(64, 1024, dtype=torch.int8))
    save(QParams(layers={"layer": rounded}), tmp_path / "with")
    sizes = [(tmp_path / name).stat().st_size for name in ("with", "without")]
    assert sizes[0] - sizes[1] <= 64 * 1024 / 2 + 512  # and two entries of the header


def rules(*pairs: tuple[str, str]) -> list[Rule]:
    """Rules from (pattern, precision)."""
    return [Rule.model_validate({"pattern": p, "precision": q}) for p, q in pairs]


def test_the_first_rule_that_matches_decides() -> None:
    """Later rules take what earlier ones left."""
    names = ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "final.proj"]
    given_ = rules(("*.fc2", "float"), ("blocks.*", "w8a8"), ("*", "float"))
    assert select(names, given_) == dict(zip(names, ("w8a8", "float", "float"), strict=True))


def test_the_message_about_a_rule_shows_one_block() -> None:
    """A model of 28 blocks has hundreds of layers; the first block says how they are called."""
    names = [f"blocks.{i}.mlp.fc1" for i in range(28)] + ["final.proj"]
    names += [f"temporal.modulation.{i}" for i in range(28)] + ["temporal.final"]
    with pytest.raises(ConfigError) as caught:
        select(names, rules(("block.*", "w8a8"), ("*", "float")))
    assert str(caught.value).endswith(
        "the layers are blocks.0.mlp.fc1, final.proj, temporal.modulation.0, temporal.final"
    )
