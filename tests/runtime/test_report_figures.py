"""Numbers on the page are those in the files: of every table, tile, caption and plot."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from ditcast.bundle import Bundle
from ditcast.runtime import kept
from ditcast.runtime.charts import SLOTS, SOURCES
from ditcast.runtime.report import PAGE, write_report
from tests.reports import NAMES, Page, audited, make_report, render, spread

FORMS = {  # of the columns of the table of figures that are spreads
    "image_ms": ",.1f",
    "full_step_ms": ",.1f",
    "reuse_step_ms": ",.1f",
    "speedup": ".2f",
    "psnr_db": ".1f",
    "ssim": ".3f",
    "detail": ".2f",
}
TIMES = "\u00d7"
JUDGED = ("psnr_db", "ssim", "detail")


@pytest.fixture(scope="module")
def written(
    shared_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Page, dict[str, Any], dict[str, Any]]:
    """A page, and the figures and the audit that its bundle keeps."""
    path = tmp_path_factory.mktemp("figures") / "b.bundle"
    shutil.copytree(shared_bundle.path, path)
    bundle = Bundle.open(path)
    report = make_report(bundle, *NAMES)
    for i, row in enumerate(report["variants"]):  # no two alike
        row |= {"ssim": spread(0.8 + i / 90), "detail": spread(0.9 + i / 50), "samples": 160 + i}
        row["peak_memory_mib"] += 10 * i
        row["size_bytes"] += 123456 * i
    report["steps"]["selection"] = ["mmmccc", "mccccc"]
    audit = audited()
    audit["layers"][1] |= {"kernel": "MatMul", "integer": False, "latency_ms": 0.4, "share": 0.4}
    kept.keep_audit(bundle, "onnxruntime", audit)
    write_report(bundle, report)
    read = (json.loads(bundle.file(name).read_text()) for name in (kept.FIGURES, kept.AUDIT))
    return Page(bundle.file(PAGE).read_text()), *read


def cell(found: dict[str, float] | None, form: str, unit: str = "") -> str:
    """A median and its percentiles."""
    if found is None:
        return "\u2013"
    low, middle, high = (format(found[key], form) + unit for key in ("p10", "p50", "p90"))
    return f"{middle} {low} \u2013 {high}" if found["p10"] != found["p90"] else middle


def mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def table(page: Page, *heads: str) -> list[list[str]]:
    """The rows below those column heads."""
    (found,) = (rows for rows in page.tables if tuple(rows[0][: len(heads)]) == heads)
    return found[1:]


def test_every_figure(written: Any) -> None:
    """All rows and all columns; full precision is its own reference."""
    page, figures, _ = written
    wanted = []
    for i, row in enumerate(figures["variants"]):
        name = row["name"] + (f" {row['spacing']} spacing" if row["spacing"] else "")
        cells = {key: cell(row[key], form) for key, form in FORMS.items()}
        if i == 0:
            cells |= {"speedup": "1"} | dict.fromkeys(JUDGED, "reference")
        ends = [mib(row["size_bytes"]), f"{row['peak_memory_mib']:,.0f}", str(row["samples"])]
        wanted.append([name, f"{row['full_steps']} of {row['steps']}", *cells.values(), *ends])
    assert table(page, "variant", "full steps") == wanted


def test_tiles_and_captions(written: Any) -> None:
    page, figures, _ = written
    exact, *_, best, _rival = figures["variants"]
    tiles = [
        f"Speed-up {cell(best['speedup'], '.2f', TIMES)}",
        f"PSNR {cell(best['psnr_db'], '.1f', ' dB')}",
        f"SSIM {cell(best['ssim'], '.3f')}",
        f"Graphs {mib(best['size_bytes'])} MiB full precision {mib(exact['size_bytes'])} MiB",
    ]
    assert " ".join(tiles) in page.text
    assert f"{exact['name']} reference {exact['image_ms']['p50']:,.1f} ms / image" in page.text
    for row in figures["variants"][1:]:
        psnr, ssim, ms = (row[key]["p50"] for key in ("psnr_db", "ssim", "image_ms"))
        caption = f"{row['name']} {psnr:.1f} dB \u00b7 SSIM {ssim:.3f} {ms:,.1f} ms / image"
        assert caption in page.text


def test_each_gain_alone(written: Any) -> None:
    page, figures, _ = written
    titles = ("full precision", "quantization only", "cache only", "both")
    wanted: list[list[str]] = []
    for title, row in zip(titles, figures["variants"], strict=False):
        cells = [cell(row[key], FORMS[key]) for key in ("speedup", "psnr_db", "ssim")]
        cells = ["1", "reference", "reference"] if not wanted else cells
        ends = [mib(row["size_bytes"]), str(row["samples"])]
        wanted.append([title, row["name"], *cells, *ends])
    both = figures["interaction"]
    speed, psnr = both["speedup"], both["psnr_db"]
    speed = " ".join("\u00d7 " + part for part in cell(speed, ".2f").split(" ", 1))
    speed = speed.replace("\u2013 ", "\u2013 \u00d7 ")
    last = ["interaction", "", speed, cell(psnr, "+.1f"), "", "", str(both["samples"])]
    assert table(page, "", "variant") == [*wanted, last]


def test_kernels_and_layers(written: Any) -> None:
    page, _, audit = written
    times = {layer["kernel"]: layer["latency_ms"] for layer in audit["layers"]} | audit["other_ms"]
    total = sum(times.values())
    found = {row[0]: row[3:5] for row in table(page, "kernel", "of")}
    assert found.pop("all kernels") == [f"{total:,.2f}", "100%"]
    assert found == {name: [f"{ms:,.2f}", f"{ms / total:.1%}"] for name, ms in times.items()}
    roof = audit["giga_ops"]["8"]
    assert table(page, "layer", "precision") == [
        [
            layer["layer"],
            layer["precision"],
            layer["kernel"],
            "integer" if layer["integer"] else "float",
            f"{layer['latency_ms']:.3f}",
            f"{layer['share']:.1%}",
            f"{layer['giga_ops']:,.0f}",
            f"{layer['giga_ops'] / roof:.0%}",
        ]
        for layer in audit["layers"]
    ]
    assert f"step that export wrote down comes out at {audit['golden_db']:.1f} dB" in page.text


def test_facts(written: Any) -> None:
    """Recipe, request, machine, versions, backend and cost, as they were written down."""
    page, figures, _ = written
    shown = [row for rows in page.tables for row in rows if len(row) == 2]
    machine = dict(figures["machine"])
    parts = [machine.pop("versions"), machine, figures["request"], figures["backend"]]
    for values in [*parts, figures["bundle"]["recipe"]]:
        for key, value in values.items():
            if not isinstance(value, list):
                text = "none" if value is None else str(value)
                assert [key.replace("_", " "), text] in shown
    assert ["graphs and calibration, by which figures go stale", figures["bundle"]["content"]] in (
        shown
    )
    wanted = []
    for name, spent in figures["cost"].items():
        wanted.append([name, f"{spent['seconds']:,.1f}", f"{spent['peak_memory_mib']:,.0f}"])
        wanted += [[part, f"{seconds:,.1f}", ""] for part, seconds in spent["parts"].items()]
    assert table(page, "stage", "seconds") == wanted


def test_points_of_speed_and_fidelity(written: Any) -> None:
    page, figures, _ = written
    front, *marks = page.plots["plot-speed"]["data"]
    rows = figures["variants"][1:]
    for row, mark in zip(rows, marks, strict=True):
        for axis, key in (("x", "speedup"), ("y", "psnr_db")):
            low, middle, high = (row[key][part] for part in ("p10", "p50", "p90"))
            assert mark[axis] == [middle]
            bars = mark[f"error_{axis}"]
            assert bars["array"] == [pytest.approx(high - middle)]
            assert bars["arrayminus"] == [pytest.approx(middle - low)]
    points = [(row["speedup"]["p50"], row["psnr_db"]["p50"]) for row in rows]
    best = [p for p in points if not any(q[0] > p[0] and q[1] > p[1] for q in points)]
    assert sorted(zip(front["x"], front["y"], strict=True)) == sorted(best)


def test_lines_over_steps(written: Any) -> None:
    page, figures, _ = written
    steps = figures["steps"]
    lines = {line["name"]: line["y"] for line in page.plots["plot-closeness"]["data"]}
    assert lines == steps["closeness_db"]
    (line,) = page.plots["plot-cosine"]["data"]
    assert line["y"] == steps["feature_cosine"]
    assert line["x"] == list(range(len(steps["timesteps"])))
    for line in page.plots["plot-ranges"]["data"]:
        scales = steps["ranges"][line["name"]]
        assert line["y"] == pytest.approx([scale / max(scales) for scale in scales])


def test_maps_over_steps(written: Any) -> None:
    page, figures, _ = written
    steps = figures["steps"]
    for name, kinds, key in (("plan", SLOTS, "plan"), ("selection", SOURCES, "selection")):
        (found,) = page.plots[f"plot-{name}"]["data"]
        assert found["text"] == [[kinds[letter][0] for letter in row] for row in steps[key]]
        assert found["customdata"] == [steps["timesteps"]] * len(steps[key])
        words = {
            code: word
            for row in zip(found["z"], found["text"], strict=True)
            for code, word in zip(*row, strict=True)
        }
        assert len(set(words.values())) == len(words)
    assert page.plots["plot-plan"]["data"][0]["y"] == steps["slots"]
    inputs = steps["inputs"]
    found, marks = page.plots["plot-inputs"]["data"]
    assert found["y"] == list(inputs["largest"])
    for row, pairs, name in zip(found["z"], found["customdata"], found["y"], strict=True):
        largest, limits = inputs["largest"][name], inputs["representable"][name]
        assert pairs == [list(pair) for pair in zip(largest, limits, strict=True)]
        assert [share or 0 for share in row] == pytest.approx(
            [value / max(largest) for value in largest], rel=1e-2
        )
        assert [share is None for share in row] == [value == 0 for value in largest]
    assert list(zip(marks["x"], marks["y"], strict=True)) == [(2, "blocks.0.attn.qkv")]
    (found,) = page.plots["plot-forecast"]["data"]
    for slot, row in enumerate(found["z"]):
        errors, reuses = steps["forecast_error"][slot], steps["reuse_error"][slot]
        assert row == [e / r if r else None for e, r in zip(errors, reuses, strict=True)]
        assert found["customdata"][slot] == [list(p) for p in zip(errors, reuses, strict=True)]


def test_page_says_what_inputs_do(bundle: Bundle) -> None:
    """Which layer's moves the most, what is clipped, and why there may be no map."""
    report = make_report(bundle, *NAMES)
    page = render(bundle, report)
    assert (
        "blocks.0.attn.qkv moves the most: its largest input is 5 times as large at step 5 as at "
        "step 0. 1 of 9 are clearly above what their scale can represent; the farthest is 1.18 "
        "times that."
    ) in page.text
    names = [f"blocks.{i}.mlp.fc1" for i in range(400)]
    row = [1.0 + i / 1000 for i in range(100)]
    report["steps"]["inputs"] |= {"largest": dict.fromkeys(names, row)}
    report["steps"]["inputs"] |= {"representable": dict.fromkeys(names, [2.0] * 100)}
    assert "0 of 40000 are clearly above" in render(bundle, report).text  # in a page that is small
    for found, sentence in (
        ({"largest": {}, "representable": {}, "timesteps": [1]}, "Every input stays in float."),
        (None, "It was not recorded when this bundle was calibrated or measured, as earlier"),
    ):
        report["steps"]["inputs"] = found
        page = render(bundle, report)
        assert sentence in page.text
        assert 'id="plot-inputs"' not in page.source
    del report["steps"]["inputs"]  # as earlier versions wrote it
    assert render(bundle, report).source == page.source


def test_page_of_costs_without_parts(bundle: Bundle) -> None:
    """As earlier versions wrote them."""
    report = make_report(bundle, *NAMES)
    for spent in report["cost"].values():
        del spent["parts"]
    page = render(bundle, report)
    assert "calibrate 93.1 1,024 export 12.3 2,048" in page.text
    assert kept.figures(bundle)["cost"] == report["cost"]
