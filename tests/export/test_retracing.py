"""Which graphs of a quantized model are traced again, beside those of full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ditcast.export import stage
from ditcast.models import LoadedModel
from tests.conftest import make_bundle


@pytest.mark.parametrize(
    ("keys", "again"),
    [
        ({}, []),
        ({"temporal": "tib", "fsc": "tib"}, ["temporal"]),
        ({"scheme": "w6a6"}, ["full", "reuse"]),
    ],
    ids=["w8a8", "a TIB with ranges per step", "w6a6"],
)
def test_a_model_is_traced_again_only_where_its_graphs_change(
    model: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
    again: list[str],
) -> None:
    """Q/DQ nodes are all that 8 bits add to full precision; fewer bits clip besides.

    What changes and is not traced again would fail its parity, as in `test_schemes.py`.
    """
    traced: list[str] = []
    trace = vars(stage)["trace"]  # which remembers
    steps = {module: name for name, module in model.adapter.steps.items()}

    def count(module: Any, *arguments: Any, **options: Any) -> Any:
        traced.append(steps.get(module, "temporal"))
        return trace(module, *arguments, **options)

    monkeypatch.setattr(stage, "trace", count)
    make_bundle(model, tmp_path / "b", **keys)
    assert traced == ["temporal", "full", "reuse", *again]
