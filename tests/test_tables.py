"""What people read on the terminal about an audit."""

from __future__ import annotations

import pytest

from ditcast.runtime.audit import Audit, LayerAudit
from ditcast.tables import audit_lines, audit_rows, show, warn_of_slow_integers


def audited(rates: dict[int, float], weight_bits: int = 8) -> Audit:
    layer = LayerAudit(
        layer="blocks.0.mlp.fc1",
        block="blocks.0.mlp",
        precision="w8a8",
        kernel="Int",
        integer=True,
        wanted=True,
        latency_ms=6.0,
        share=0.6,
        giga_ops=150.0,
    )
    other = {f"Kernel{i}": 0.4 for i in range(10)}
    return Audit("full", (layer,), other, 99.0, rates, weight_bits, {})


def test_the_table_adds_up() -> None:
    """Shares are of all kernels; what is too much to show is summed up; the roof is measured."""
    header, layer, *kernels, total = audit_rows(audited({0: 100.0, 7: 300.0, 8: 200.0}))
    assert header == ["layer", "kernel", "precision", "ms", "share", "Gop/s", "of roof"]
    assert layer == ["blocks.0.mlp.fc1 (w8a8)", "Int", "integer", "6.00", "60.0%", "150", "75%"]
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


def test_a_layer_whose_input_stays_in_float_is_not_lost() -> None:
    """Only its weight is quantized, so that a float kernel is what it needs; one has to run."""
    found = audited({0: 100.0, 7: 300.0, 8: 200.0}, weight_bits=0)
    layer = found.layers[0]._replace(
        precision="w4a16", integer=False, wanted=False, kernel="Gemm", giga_ops=0
    )
    found = found._replace(layers=(layer,))
    assert found.lost == ()
    assert found.roof is None
    assert audit_rows(found)[1][:3] == ["blocks.0.mlp.fc1 (w4a16)", "Gemm", "float"]
    assert audit_lines(found) == [
        "audit: 1 layers have quantized weights only: they are smaller, and run in float",
        "audit: the golden step comes out at 99.0 dB",
    ]
    gone = found._replace(layers=(layer._replace(kernel="missing"),))
    assert gone.lost == gone.layers
    assert audit_lines(gone)[0] == "FLOAT blocks.0.mlp.fc1: missing"


def test_layers_of_the_tib_are_no_part_of_a_step() -> None:
    """They run once per request: the sum of a step's kernels is without them."""
    found = audited({0: 100.0, 7: 300.0, 8: 200.0})
    once = found.layers[0]._replace(layer="temporal.modulation.0", latency_ms=50.0, giga_ops=0.0)
    rows = audit_rows(found._replace(layers=(once, *found.layers)))
    assert rows[1][0] == "temporal.modulation.0 (w8a8)"
    assert rows[1][-2:] == ["-", "-"]
    assert rows[-1][3] == "10.00"
    assert "2 of 2 quantized layers" in audit_lines(found._replace(layers=(once, *found.layers)))[0]


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
