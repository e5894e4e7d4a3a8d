"""What people read on the terminal about an audit."""

from __future__ import annotations

import pytest

from ditcast.runtime.audit import Audit, LayerAudit
from ditcast.tables import audit_lines, audit_rows, show, warn_of_slow_integers


def audited(rates: dict[int, float], weight_bits: int = 8) -> Audit:
    layer = LayerAudit("blocks.0.mlp.fc1", "blocks.0.mlp", "Int", True, 6.0, 0.6, 150.0)
    other = {f"Kernel{i}": 0.4 for i in range(10)}
    return Audit("full", (layer,), other, 99.0, rates, weight_bits, {})


def test_the_table_adds_up() -> None:
    """Shares are of all kernels; what is too much to show is summed up; the roof is measured."""
    header, layer, *kernels, total = audit_rows(audited({0: 100.0, 7: 300.0, 8: 200.0}))
    assert header == ["layer", "kernel", "precision", "ms", "share", "Gop/s", "of roof"]
    assert layer == ["blocks.0.mlp.fc1", "Int", "integer", "6.00", "60.0%", "150", "75%"]
    assert len(kernels) == 9
    assert kernels[-1] == ["", "(others)", "", "0.80", "8.0%", "", ""]
    assert total == ["all kernels", "", "", "10.00", "100%", "", ""]


def test_a_layer_in_float_stands_out(capsys: pytest.CaptureFixture[str]) -> None:
    found = audited({})
    lost = found._replace(layers=(found.layers[0]._replace(integer=False, kernel="Gemm"),))
    assert audit_rows(lost)[1][2] == "FLOAT"
    assert audit_rows(lost)[1][6] == "-"
    assert audit_lines(lost)[0] == "FLOAT blocks.0.mlp.fc1: Gemm"
    show(audit_rows(lost), right=3)
    assert "FLOAT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rates", "bits", "said"),
    [
        ({0: 100.0, 7: 180.0, 8: 130.0}, 8, "8-bit weights is 1.30 times as fast as in float; "),
        ({0: 100.0, 7: 180.0, 8: 130.0}, 7, "7-bit weights is 1.80 times as fast as in float\n"),
        ({0: 100.0, 7: 900.0, 8: 900.0}, 8, ""),
        ({}, 8, ""),
    ],
)
def test_integers_that_may_not_pay(
    rates: dict[int, float], bits: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning with the measured ratio, and what is faster."""
    warn_of_slow_integers(audited(rates, bits))
    found = capsys.readouterr().err
    if not said:
        assert found == ""
        return
    assert found.startswith("ditcast: warning: int8 may not pay on this CPU (flags: ")
    assert said in found
    assert ("with --scheme w7a8 it is 1.80" in found) == (bits == 8)
