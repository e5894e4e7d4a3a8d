"""The report in the bundle: files that the manifest vouches for, and a page that is honest."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ditcast.bundle import Bundle
from ditcast.runtime import fidelity, kept
from ditcast.runtime.report import PAGE, write_report
from tests.conftest import Cli
from tests.reports import NAMES, Page, audited, make_report, render, spread, with_distances


def test_the_bundle_vouches_for_every_report(bundle: Bundle) -> None:
    report = make_report(bundle, *NAMES)
    write_report(bundle, report)
    reopened = Bundle.open(bundle.path)
    slugs = ("full-precision", "w8a8", "cache", "w8a8-cache", "3-steps")
    names = ["bench.json", *(f"{slug}.png" for slug in slugs), "report.html"]
    assert reopened.manifest.reports == tuple(sorted(f"reports/{name}" for name in names))
    assert set(reopened.manifest.reports) <= set(reopened.manifest.files)
    reopened.verify()
    figures = json.loads(reopened.file("reports/bench.json").read_text())
    assert figures == {key: value for key, value in report.items() if key != "shown"}
    with Image.open(reopened.file("reports/w8a8-cache.png")) as picture:
        assert picture.size == (18, 18)  # 2 x 2 samples of 8 x 8 with a gap of 2


def test_another_report_replaces_the_first(bundle: Bundle) -> None:
    write_report(bundle, make_report(bundle, *NAMES))
    Bundle.open(bundle.path).staged("reports/left-by-a-killed-run.png").write_bytes(b"")
    write_report(bundle, make_report(bundle, "full precision"))
    reopened = Bundle.open(bundle.path)
    reopened.verify()
    found = sorted(path.name for path in reopened.file("reports").iterdir())
    assert found == ["bench.json", "full-precision.png", "report.html"]


def test_page_shows_every_figure_and_loads_nothing(bundle: Bundle) -> None:
    report = make_report(bundle, *NAMES)
    page = render(bundle, report)
    for variant in report["variants"]:
        assert variant["name"] in page.text
        assert f"{variant['image_ms']['p50']:.1f}" in page.text
    for variant in report["variants"][1:]:
        assert f"{variant['speedup']['p50']:.2f}" in page.text
        assert f"{variant['psnr_db']['p50']:.1f}" in page.text
    assert "2.04 \u2013 2.50" in page.text  # the spread of 2.27
    assert page.tags.count("img") == len(NAMES)
    local = [load for load in page.loads if load.startswith("#")]
    assert all(load.startswith("data:image/png;base64,") for load in set(page.loads) - {*local})
    assert "link" not in page.tags
    assert "iframe" not in page.tags
    assert 'id="plotly"' in page.source


def test_page_shows_distances_where_they_are_measured(bundle: Bundle) -> None:
    """With intervals and what they stand on; without them, neither columns nor words."""
    assert "FD to" not in render(bundle, make_report(bundle, *NAMES)).text
    report = with_distances(make_report(bundle, *NAMES))
    page = render(bundle, report)
    assert "FD to fp KD to fp FD to real KD to real" in page.text
    for row in report["variants"]:
        for key in fidelity.DISTANCES:
            if row[key] is not None:
                found = "{value:.4g} {low:.4g} – {high:.4g}".format(**row[key])
                assert found in page.text
    assert "160 pictures per side and 16 dimensions of PCA (Some Network, 7 features)" in page.text
    assert "Distances extractor Some Network, 7 features pictures per side 160" in page.text
    assert f"real sha256 {'a' * 64}" in page.text
    assert "--seed 7 --real real.npz" in page.text


def test_verdict_has_speed_fidelity_size_and_hardware(bundle: Bundle) -> None:
    page = render(bundle, make_report(bundle, *NAMES))
    assert (
        "w8a8 + cache is 2.27 times as fast as full precision (18.4 instead of 41.7 ms per "
        "image), at a median PSNR of 26.1 dB to its images (160 samples), with 1.0 MiB of graphs "
        "instead of 3.0 MiB, measured on Test CPU with 2 threads on 2026-01-02."
    ) in page.text
    assert "w8a8 is slower than full precision, at 0.78 times its speed" in page.text
    assert "3 steps, trailing spacing, is 2.13 times as fast as full precision" in page.text
    assert "w8a8 + cache is faster and 4.8 dB closer." in page.text
    assert f"ditcast bench {bundle.path.name} --images 160 --seed 7" in page.text
    assert "they can move by 5 dB" not in page.text
    assert "calibrate 93.1 1,024" in page.text  # seconds and MiB


@pytest.mark.parametrize(
    ("speedup", "psnr", "clause"),
    [
        (2.13, 30.1, "it is 4.0 dB closer, so fewer steps are the better choice by PSNR."),
        (1.10, 30.1, "it is 4.0 dB closer but takes 2.06 times as long as w8a8 + cache, so this"),
        (2.80, 25.1, "w8a8 + cache is 1.0 dB closer at 0.81 times its speed."),
    ],
    ids=["equal time", "slower", "faster"],
)
def test_page_weighs_fewer_steps(bundle: Bundle, speedup: float, psnr: float, clause: str) -> None:
    report = make_report(bundle, *NAMES)
    report["variants"][-1] |= {"speedup": spread(speedup), "psnr_db": spread(psnr)}
    assert clause in render(bundle, report).text


def test_page_says_when_one_gain_alone_is_better(bundle: Bundle) -> None:
    report = make_report(bundle, *NAMES)
    sentence = "cache alone is both faster and closer than w8a8 + cache: it is 2.40 times as fast"
    assert sentence not in render(bundle, report).text
    report["variants"][2]["speedup"] = spread(2.40)
    assert sentence in render(bundle, report).text


def test_page_says_when_fidelity_means_nothing(bundle: Bundle) -> None:
    report = make_report(bundle, *NAMES[:-1])
    report["bundle"]["random_weights"] = True
    for variant in report["variants"]:
        variant["samples"] = 1
    page = render(bundle, report)
    assert "The weights are random: fidelity means nothing here." in page.text
    assert "(1 sample, of random weights, so this figure means nothing)" in page.text
    assert "over fewer than 128 they can move by 5 dB" in page.text


def test_page_escapes_what_it_is_given(bundle: Bundle) -> None:
    hostile = """</script><script>alert('x')</script>"><img src=http://a.example/x onerror=x>&"""
    report = make_report(bundle, *NAMES)
    clean = render(bundle, report)
    for section, key in (("bundle", "model"), ("machine", "cpu"), ("backend", "integer_mode")):
        report[section][key] = hostile
    report["variants"][1]["name"] = hostile
    report["shown"][hostile] = report["shown"].pop("w8a8")
    report["steps"]["slots"][0] = hostile
    report["steps"]["closeness_db"][hostile] = report["steps"]["closeness_db"].pop("w8a8")
    page = render(bundle, report)
    assert page.tags == clean.tags
    assert not [load for load in page.loads if load.startswith("http")]
    assert hostile in page.text
    Bundle.open(bundle.path).verify()


@pytest.mark.parametrize("names", [NAMES[:1], NAMES[:2], (NAMES[0], NAMES[2]), NAMES[:4]])
def test_page_of_fewer_variants(bundle: Bundle, names: tuple[str, ...]) -> None:
    page = render(bundle, make_report(bundle, *names))
    assert ('id="plotly"' in page.source) == (len(names) > 1)
    if len(names) == 1:
        assert "Full precision takes 41.7 ms per image" in page.text
    else:
        assert f"{names[-1]} is" in page.text


def test_page_of_latents_without_figures(bundle: Bundle) -> None:
    report = make_report(bundle, *NAMES, shape=(1, 4, 8, 8))
    for variant in report["variants"]:
        for key, value in variant.items():
            if isinstance(value, dict):
                variant[key] = None
        variant["peak_memory_mib"] = None
    page = render(bundle, report)
    assert "img" not in page.tags
    assert 'id="plot-speed"' not in page.source
    assert "The samples are latents" in page.text
    assert "w8a8 + cache was not timed, with unknown fidelity (160 samples)" in page.text
    assert bundle.manifest.reports == ("reports/bench.json", "reports/report.html")


def test_large_samples_do_not_make_a_large_page(bundle: Bundle) -> None:
    page = render(bundle, make_report(bundle, *NAMES, shape=(16, 3, 128, 128)))
    assert "Pictures are reduced" in page.text


def test_without_the_extra_there_is_no_page(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.io", None)
    assert write_report(bundle, make_report(bundle, *NAMES[:2])) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "plotly" in line
    assert "pip install 'ditcast[report]'" in line
    names = ("bench.json", "full-precision.png", "w8a8.png")
    assert bundle.manifest.reports == tuple(f"reports/{name}" for name in names)
    Bundle.open(bundle.path).verify()


def test_the_same_report_makes_the_same_page(bundle: Bundle) -> None:
    report = make_report(bundle, *NAMES)
    first = render(bundle, copy.deepcopy(report))
    assert render(bundle, report).source == first.source


def test_the_page_again(cli: Cli, bundle: Bundle, tmp_path: Path) -> None:
    """From what the bundle keeps: the very same, with the pictures as they were."""
    first = render(bundle, make_report(bundle, *NAMES)).source
    bundle.file(PAGE).unlink()
    bundle.staged(PAGE).write_text("older")
    bundle.commit({})
    done = cli("report", bundle.path)
    assert (done.code, done.out, done.err) == (0, f"report: {bundle.file(PAGE)}\n", "")
    assert bundle.file(PAGE).read_text() == first
    Bundle.open(bundle.path).verify()
    before = Bundle.open(bundle.path).manifest
    done = cli("report", bundle.path, "-o", tmp_path / "page.html")
    assert (done.code, done.out) == (0, f"report: {tmp_path / 'page.html'}\n")
    assert (tmp_path / "page.html").read_text() == first
    assert Bundle.open(bundle.path).manifest == before


def test_an_audit_joins_the_page(cli: Cli, bundle: Bundle) -> None:
    """Where it is of the same graphs and backend; else the page says how to make one."""
    page = render(bundle, make_report(bundle, *NAMES))
    assert f"No audit was kept; make one with: ditcast audit {bundle.path.name}" in page.text
    kept.keep_audit(bundle, "onnxruntime", audited())
    assert cli("report", bundle.path).code == 0
    page = Page(bundle.file(PAGE).read_text())
    assert "2 of 2 quantized layers run in integer kernels" in page.text
    assert "MatMulIntegerToFloat" in page.text
    assert "62%" in page.text  # 400 of 650 Gop/s
    assert "w8a8 layer, integer 2 0.50 62.5%" in page.text  # of 0.8 ms
    opened = Bundle.open(bundle.path)
    write_report(opened, make_report(opened, *NAMES))  # another measurement keeps it
    assert "MatMulIntegerToFloat" in opened.file(PAGE).read_text()
    kept.keep_audit(opened, "onnxruntime", audited() | {"backend": "openvino"})
    assert cli("report", opened.path).code == 0
    assert "The audit is of backend openvino" in opened.file(PAGE).read_text()


def test_each_gain_alone_and_what_they_do_to_each_other(bundle: Bundle) -> None:
    report = make_report(bundle, *NAMES)
    page = render(bundle, report)
    assert "quantization only w8a8 0.78" in page.text
    assert "interaction \u00d7 1.60 \u00d7 1.44 \u2013 \u00d7 1.76 -0.4" in page.text
    assert "Both together are 1.60 times as fast as the product" in page.text
    assert "their errors add up as independent ones do (-0.4 dB)" in page.text
    assert "All spreads are over images, each with noise of its own" in page.text
    report["interaction"] |= {"psnr_db": spread(-3.0), "speedup": spread(1.05)}
    assert "as fast as the product of the two speed-ups, within" in render(bundle, report).text
    assert "at 3.0 dB worse than two independent errors" in render(bundle, report).text


def test_step_by_step(bundle: Bundle) -> None:
    page = render(bundle, make_report(bundle, *NAMES))
    assert "held back by the noise guard: 1 of 24" in page.text
    assert "forecast: 7 of 24" in page.text
    assert "one scale for all steps" not in page.text
    for name in ("closeness", "cosine", "plan", "forecast", "inputs", "ranges", "speed"):
        assert f'id="plot-{name}"' in page.source
    assert "All of them are computed in float ( --temporal fp ); --temporal select" in page.text
    assert "(--temporal fp), so it is about 1 throughout" in page.text
    assert "Error of the forecasts over that of plain reuse" in page.text
    report = make_report(bundle, *NAMES)
    report["bundle"]["recipe"]["guard"] = "noise"
    title = "Noise that the forecasts amplify over half of the change that they predict"
    assert title in render(bundle, report).text
    report = make_report(bundle, *NAMES[:2])
    report["steps"]["selection"] = ["mmmccc", "mccccc"]
    page = render(bundle, report)
    assert 'id="plot-forecast"' not in page.source
    assert "noise guard" not in page.text
    assert "Nothing is cached: every slot is computed at every step." in page.text
    assert "computed by the quantized module: 4 of 12 stored: 8 of 12" in page.text
    assert 'id="plot-selection"' in page.source
    assert "one scale for all steps; --fsc all makes them one per step." in page.text
    assert 'id="plot-plan"' not in page.source
    assert "--temporal select" not in page.text


def test_page_says_how_errors_of_forecasts_are_measured(bundle: Bundle) -> None:
    """Where there are forecasts, and the guard is off."""
    report = make_report(bundle, *NAMES)
    report["steps"] |= {"forecast_error": None, "reuse_error": None}
    report["bundle"]["recipe"]["cache"] = "taylor"
    sentence = "It was not measured, as the noise guard is off: --guard error measures it"
    assert sentence in render(bundle, report).text
    report["bundle"]["recipe"]["cache"] = "output"  # whose forecasts no guard holds back
    assert sentence not in render(bundle, report).text
    report["bundle"]["recipe"]["cache"] = "taylor"
    report["steps"]["plan"] = ["frfrfr"] * 4
    assert sentence not in render(bundle, report).text


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"scheme": "none"}, "They are full precision's: nothing is quantized."),
        ({"balance": "smooth"}, "Factors of balancing or scales per step are folded into them"),
        ({"fsc": "all"}, "Factors of balancing or scales per step are folded into them"),
        ({}, "It was not measured here; ditcast bench measures it."),
    ],
)
def test_page_says_why_features_do_not_compare(
    bundle: Bundle, keys: dict[str, Any], sentence: str
) -> None:
    report = make_report(bundle, *NAMES)
    report["bundle"]["recipe"] |= keys
    report["steps"]["feature_cosine"] = None
    page = render(bundle, report)
    assert sentence in page.text
    assert 'id="plot-cosine"' not in page.source
    del report["steps"]["feature_cosine"]  # as earlier versions wrote it
    assert render(bundle, report).source == page.source


def test_provenance(bundle: Bundle) -> None:
    """Versions of what made the bundle, and the hash by which figures are found to be stale."""
    page = render(bundle, make_report(bundle, *NAMES))
    for name in ("torch", "diffusers", "onnx", "ditcast"):
        assert f" {name} {bundle.manifest.producer[name]} " in page.text
    content = bundle.content(["reference", "onnxruntime"])
    assert f"graphs and calibration, by which figures go stale {content}" in page.text


def missing(bundle: Bundle) -> None:
    bundle.commit({"reports": ()}, replaces="reports/")


def stale(bundle: Bundle) -> None:
    name = "graphs/onnxruntime/full.onnx"
    bundle.staged(name).write_bytes(bundle.file(name).read_bytes() + b" ")
    bundle.commit({})


def other_size(bundle: Bundle) -> None:
    Image.new("RGB", (3, 3)).save(bundle.staged("reports/cache.png"))
    bundle.commit({})


def no_picture(bundle: Bundle) -> None:
    bundle.staged("reports/cache.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    bundle.commit({})


def older(bundle: Bundle) -> None:
    bundle.staged("reports/bench.json").write_text("{}")
    bundle.commit({})


@pytest.mark.parametrize(
    ("plant", "line"),
    [
        (missing, "has no reports/bench.json; measure with: ditcast bench"),
        (stale, "has changed since reports/bench.json was measured; measure again with"),
        (other_size, "cache.png in b does not hold the pictures that were measured (another size)"),
        (no_picture, "cache.png in b does not hold the pictures that were measured"),
        (older, "no report of this version of ditcast (machine: field required); measure again"),
    ],
)
def test_no_page_of_something_else(
    cli: Cli,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[Bundle], None],
    line: str,
) -> None:
    write_report(bundle, make_report(bundle, *NAMES))
    plant(bundle)
    bundle.path.rename(bundle.path.parent / "b")
    monkeypatch.chdir(bundle.path.parent)
    done = cli("report", "b")
    assert (done.code, done.out) == (2, "")
    assert line in done.err
    assert len(done.err.splitlines()) == 1


def test_a_page_that_cannot_be_written(cli: Cli, bundle: Bundle, tmp_path: Path) -> None:
    write_report(bundle, make_report(bundle, *NAMES[:2]))
    done = cli("report", bundle.path, "-o", tmp_path / "no" / "page.html")
    assert done.code == 2
    assert f"output: no folder {tmp_path / 'no'}; create it first" in done.err


def test_import_brings_no_optional_package() -> None:
    module = "ditcast.runtime.report"
    code = f"import sys, {module}; print({{'torch', 'jinja2', 'plotly'}} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
